// The gradient of the input, without atomics on it: samples are sorted by the cell of the volume that they fall into,
// and the contributions of a cell's samples to its eight corners are summed in registers.
//
// Scattering instead takes 8 x taps x C atomic additions per output voxel. The L2 cache serves those several times
// slower than a multiprocessor adds in registers, and their order is not fixed. The sort moves 16 bytes per voxel and
// tap, for any number of channels, and each sample's gradient is then read once, not once per corner.
//
//   deform_count   counts the samples of each cell and gives each sample its rank there (integer atomics: the order
//                  within a cell differs from run to run); or, with `keys`, only names the cells, for a stable sort
//   deform_place   writes each sample's record at its place in the sorted order
//   deform_gather  walks along rows of cells and writes their contributions to the voxels at their four edges
//
// A cell is the box between eight voxels, numbered by its lowest corner plus one along each axis, which may be outside:
// (D + 1) x (H + 1) x (W + 1) cells per sample and offset group. A sample's id is
// (voxel * offset_groups + group) * taps + tap, counted from `first_voxel`, the first output voxel of the launch.
//
// COLUMNS 1: the gradients to distribute are rows of `columns`, one per id, as in dense and grouped convolutions;
// 0: they are the weight times the output's gradient, as in depthwise convolution.

struct __align__(16) Record {
    Real d, h, w;
    int id;
};

// The data by which `deform_count` and `deform_place` find a sample.
struct Search {
    Convolution v;
    StoredShifts shifts;
    int64 first_voxel, first_n;
    int groups;

    // Returns the cell of a sample, or -1 if it is outside, and writes its distances.
    __device__ __forceinline__ int64 cell(int64 voxel, int group, int tap, Sample& s) const {
        int64 within = (int64)v.out_D * v.out_H * v.out_W, all = first_voxel + voxel;
        int n = (int)(all / within), rest = (int)(all % within);
        int w = rest % v.out_W, h = rest / v.out_W % v.out_H, d = rest / v.out_W / v.out_H;
        Real shift[3];
        shifts(n, d, h, w, 0, group * v.taps + tap, shift);
        int low_d, low_h, low_w;
        if (!locate(v, d, h, w, tap, shift[0], shift[1], shift[2], s, low_d, low_h, low_w)) return -1;
        int64 place = (n - first_n) * groups + group;
        return ((place * (v.D + 1) + low_d + 1) * (v.H + 1) + low_h + 1) * (v.W + 1) + low_w + 1;
    }
};

#define SEARCH_ARGUMENTS                                                                                              \
    const Scalar *__restrict__ offset, CONVOLUTION_ARGUMENTS, int64 offset_n, int64 offset_c, int64 offset_v,         \
        int64 first_n, int64 first_voxel, int64 voxels, int64 groups, int64 cells
#define SEARCH                                                                                                        \
    {                                                                                                                 \
        CONVOLUTION, {offset, nullptr, offset_n, offset_c, offset_v, 0, 0, 0, (int)out_H, (int)out_W}, first_voxel,   \
            first_n, (int)groups                                                                                      \
    }

// Splits an item number into voxel, group and tap so that neighbouring threads read neighbouring shifts.
__device__ __forceinline__ void divide(
    int64 item, int64 voxels, int groups, int taps, bool taps_first, int64& voxel, int& group, int& tap
) {
    int per_voxel = groups * taps;
    voxel = taps_first ? item / per_voxel : item % voxels;
    int sample = (int)(taps_first ? item % per_voxel : item / voxels);
    group = sample / taps;
    tap = sample % taps;
}

extern "C" __global__ void __launch_bounds__(256)
    deform_count(SEARCH_ARGUMENTS, int* __restrict__ counts, int* __restrict__ ranks, int* __restrict__ keys) {
    const Search search = SEARCH;
    const int taps = search.v.taps;
    const int64 items = voxels * groups * taps;
    for (int64 item = blockIdx.x * (int64)blockDim.x + threadIdx.x; item < items; item += gridDim.x * (int64)blockDim.x) {
        int64 voxel;
        int group, tap;
        divide(item, voxels, (int)groups, taps, offset_c == 1, voxel, group, tap);
        const int64 id = (voxel * groups + group) * taps + tap;
        Sample s;
        const int64 cell = search.cell(voxel, group, tap, s);
        if (keys) {
            keys[id] = cell < 0 ? (int)cells : (int)cell;
        } else {
            ranks[id] = cell < 0 ? 0 : atomicAdd(counts + cell, 1);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) deform_place(
    SEARCH_ARGUMENTS, const int* __restrict__ starts, const int* __restrict__ ranks, const int64* __restrict__ order,
    Record* __restrict__ records
) {
    const Search search = SEARCH;
    const int taps = search.v.taps;
    const int64 items = voxels * groups * taps;
    for (int64 item = blockIdx.x * (int64)blockDim.x + threadIdx.x; item < items; item += gridDim.x * (int64)blockDim.x) {
        int64 voxel;
        int group, tap;
        if (order) {
            divide(order[item], voxels, (int)groups, taps, true, voxel, group, tap);
        } else {
            divide(item, voxels, (int)groups, taps, offset_c == 1, voxel, group, tap);
        }
        const int64 id = (voxel * groups + group) * taps + tap;
        Sample s;
        const int64 cell = search.cell(voxel, group, tap, s);
        if (cell < 0) continue;
        records[order ? item : starts[cell] + (int64)ranks[id]] = {s.d, s.h, s.w, (int)id};
    }
}

// Along a row of cells each voxel lies between two cells, so that its sum stays in registers until both are done. Across
// rows four cells meet at a voxel: each writes to an `edges` plane of its own, [edge][n][d][h][w][c], and the four are
// added afterwards. A row is cut into segments of `segment` voxels; the cell where two segments meet is visited twice.
// The launch covers `depth` slices of the planes from `first_d` on.
extern "C" __global__ void __launch_bounds__(128, 4) deform_gather(
    const Record* __restrict__ records, const int* __restrict__ starts, const Scalar* __restrict__ weight,
    const Scalar* __restrict__ grad, const Scalar* __restrict__ columns, const Scalar* __restrict__ mask,
    Real* __restrict__ edges, CONVOLUTION_ARGUMENTS, int64 channels, int64 first_voxel, int64 groups, int64 mask_n,
    int64 mask_c, int64 mask_v, int64 samples, int64 first_d, int64 depth, int64 segment
) {
    const Convolution v = CONVOLUTION;
    const int C = (int)channels, per_group = C / (int)groups;
    const int64 out_voxels = (int64)v.out_D * v.out_H * v.out_W;
    const int64 plane = samples * depth * v.H * v.W * C;
    const int segments = (v.W + (int)segment - 1) / (int)segment;
    const int64 rows = samples * (depth + 1) * (v.H + 1) * segments;
    for (int64 row = blockIdx.x * (int64)blockDim.y + threadIdx.y; row < rows; row += gridDim.x * (int64)blockDim.y) {
        int64 rest = row / segments;
        const int first_w = (int)(row % segments) * (int)segment;
        const int end_w = first_w + (int)segment < v.W ? first_w + (int)segment : v.W;
        const int cell_h = (int)(rest % (v.H + 1));
        rest /= v.H + 1;
        const int cell_d = (int)first_d + (int)(rest % (depth + 1)), n = (int)(rest / (depth + 1));
        for (int c = threadIdx.x * VECTOR; c < C; c += blockDim.x * VECTOR) {
            const int group = c / per_group;
            const int* row_starts =
                starts + (((n * groups + group) * (v.D + 1) + cell_d) * (v.H + 1) + cell_h) * (v.W + 1);
#if !COLUMNS
            const int step = C * (int)sizeof(Scalar);  // from voxel to voxel, in bytes
            const Scalar* grad_c = moved(grad, first_voxel * step) + c;
            const Scalar* weight_c = weight + c;
#endif
            Real low[4][VECTOR] = {};  // sums of the voxels below the cell along w, at its four edges (2 * d + h)
            for (int cell_w = first_w; cell_w <= end_w; ++cell_w) {
                Real high[4][VECTOR] = {};
                const int end = row_starts[cell_w + 1];
#pragma unroll 2
                for (int i = row_starts[cell_w]; i < end; ++i) {
                    const Record r = records[i];
                    const unsigned sampled = (unsigned)r.id / (unsigned)v.taps;
                    const int tap = (int)((unsigned)r.id - sampled * (unsigned)v.taps);
                    Real towards[VECTOR];
#if COLUMNS
                    const int64 voxel = sampled / (unsigned)groups;
                    const Pack column = load(columns + (int64)r.id * per_group + (c - group * per_group));
#pragma unroll
                    for (int e = 0; e < VECTOR; ++e) towards[e] = part(column, e);
#else
                    const int64 voxel = sampled;
                    const Pack direction = load(moved(grad_c, voxel * step));
                    const Pack tap_weight = load(moved(weight_c, (int64)tap * step));
#pragma unroll
                    for (int e = 0; e < VECTOR; ++e) towards[e] = part(direction, e) * part(tap_weight, e);
#endif
                    Real above = r.w, below = 1 - r.w;
                    if (mask) {
                        const int64 all = first_voxel + voxel;
                        const Real factor = to_real(
                            mask[all / out_voxels * mask_n + all % out_voxels * mask_v + (group * v.taps + tap) * mask_c]
                        );
                        above *= factor;
                        below *= factor;
                    }
                    const Real edge[4] = {(1 - r.d) * (1 - r.h), (1 - r.d) * r.h, r.d * (1 - r.h), r.d * r.h};
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        const Real to_low = edge[k] * below, to_high = edge[k] * above;
#pragma unroll
                        for (int e = 0; e < VECTOR; ++e) {
                            low[k][e] = fma_(to_low, towards[e], low[k][e]);
                            high[k][e] = fma_(to_high, towards[e], high[k][e]);
                        }
                    }
                }
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const int d = cell_d - 1 + (k >> 1) - (int)first_d, h = cell_h - 1 + (k & 1), w = cell_w - 1;
                    if (w >= first_w && d >= 0 && d < depth && h >= 0 && h < v.H) {
                        Real* to = edges + k * plane + (((n * depth + d) * v.H + h) * v.W + w) * C + c;
#pragma unroll
                        for (int e = 0; e < VECTOR; ++e) to[e] = low[k][e];
                    }
#pragma unroll
                    for (int e = 0; e < VECTOR; ++e) low[k][e] = high[k][e];
                }
            }
        }
    }
}
