// The gradient of the input, without atomics on it: samples are sorted by the cell of the volume that they fall into,
// and each input voxel then gathers from the eight cells around it.
//
// Scattering instead needs 8 x taps x C atomic additions per output voxel, which the L2 cache serves several times
// slower than the L1 cache serves the same number of loads; and its sums have no fixed order. The sort moves 16 bytes
// per voxel and tap, whatever the number of channels.
//
//   deform_count   counts the samples of each cell and gives each sample its rank there (integer atomics: the order
//                  within a cell differs from run to run); or, with `keys`, only names the cells, for a stable sort
//   deform_place   writes each sample's record at its place in the sorted order
//   deform_gather  sums, for each input voxel and VECTOR channels, over the records of the cells around it
//
// A cell is the box between eight voxels, numbered by its lowest corner plus one along each axis, which may be outside:
// (D + 1) x (H + 1) x (W + 1) cells per sample and offset group. A sample's id is
// (voxel * offset_groups + group) * taps + tap, counted from `first_voxel`, the first output voxel of the launch.
//
// COLUMNS 1: the gradients to distribute are rows of `columns`, one per id, as dense and grouped convolutions have
// them; 0: they are weight times the output's gradient, as depthwise convolution has it.
// WIDE 1: the result is stored, and added to, in the type of the sums (Real), because several launches share it.

struct __align__(16) Record {
    Real d, h, w;
    int id;
};

// What `deform_count` and `deform_place` have to know to find a sample.
struct Search {
    Convolution v;
    StoredShifts shifts;
    int64 first_voxel, first_n;
    int groups;

    // The cell of a sample, or -1 where it is outside; its distances; and its place in the launch.
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

// Item number -> voxel, group and tap, so that neighbouring threads read neighbouring shifts.
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

#if WIDE
typedef Real Out;
#else
typedef Scalar Out;
#endif

extern "C" __global__ void __launch_bounds__(256, 2) deform_gather(
    const Record* __restrict__ records, const int* __restrict__ starts, const Scalar* __restrict__ weight,
    const Scalar* __restrict__ grad, const Scalar* __restrict__ columns, const Scalar* __restrict__ mask,
    Out* __restrict__ grad_input, CONVOLUTION_ARGUMENTS, int64 channels, int64 first_voxel, int64 groups, int64 mask_n,
    int64 mask_c, int64 mask_v, int64 tiles, int64 log_d, int64 log_h, int64 log_w
) {
    const Convolution v = CONVOLUTION;
    const int C = (int)channels, per_group = C / (int)groups;
    const int64 out_voxels = (int64)v.out_D * v.out_H * v.out_W;
    for (int64 number = blockIdx.x; number < tiles; number += gridDim.x) {
        const Tile tile = tile_at(number, v.D, v.H, v.W, (int)log_d, (int)log_h, (int)log_w);
        int d, h, w;
        voxel_of(tile, threadIdx.y, d, h, w);
        if (d >= v.D || h >= v.H || w >= v.W) continue;
        for (int c = threadIdx.x * VECTOR; c < C; c += blockDim.x * VECTOR) {
            const int group = c / per_group;
            Real sum[VECTOR] = {};
            // Two rows of cells along w at each of two heights: in a row the cell below the voxel, then that above it.
            for (int row = 0; row < 4; ++row) {
                const int cell_d = d + (row >> 1), cell_h = h + (row & 1);
                const int64 cell =
                    ((((int64)tile.n * groups + group) * (v.D + 1) + cell_d) * (v.H + 1) + cell_h) * (v.W + 1) + w;
                const int middle = starts[cell + 1], end = starts[cell + 2];
#pragma unroll 4
                for (int i = starts[cell]; i < end; ++i) {
                    const Record r = records[i];
                    // In the cell below, the voxel is the upper corner.
                    Real trilinear = (row >> 1 ? 1 - r.d : r.d) * (row & 1 ? 1 - r.h : r.h) * (i < middle ? r.w : 1 - r.w);
                    const int tap = r.id % v.taps;
                    const int64 voxel = r.id / v.taps / (int)groups;
                    if (mask) {
                        const int64 all = first_voxel + voxel;
                        trilinear *= to_real(
                            mask[all / out_voxels * mask_n + all % out_voxels * mask_v + (group * v.taps + tap) * mask_c]
                        );
                    }
#if COLUMNS
                    const Pack towards = load(columns + (int64)r.id * per_group + (c - group * per_group));
#pragma unroll
                    for (int e = 0; e < VECTOR; ++e) sum[e] = fma_(trilinear, part(towards, e), sum[e]);
#else
                    const Pack towards = load(grad + (first_voxel + voxel) * C + c);
                    const Pack tap_weight = load(weight + (int64)tap * C + c);
#pragma unroll
                    for (int e = 0; e < VECTOR; ++e) {
                        sum[e] = fma_(trilinear * part(tap_weight, e), part(towards, e), sum[e]);
                    }
#endif
                }
            }
            const int64 at = ((((int64)tile.n * v.D + d) * v.H + h) * v.W + w) * C + c;
#if WIDE
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) grad_input[at + e] += sum[e];
#else
            store(grad_input + at, sum);
#endif
        }
    }
}
