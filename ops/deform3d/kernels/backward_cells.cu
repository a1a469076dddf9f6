// The gradient of the input of a depthwise 3x3x3 convolution, one offset group, from samples sorted by backward_sort.cu.
//
//   deform_cell_gather  walks along rows of cells and writes their contributions to the voxels at their four edges
//   deform_add_edges    adds the four contributions
//
// The contributions of a cell's samples to its eight corners are summed in registers. The distances of a sample are those
// of its offset from the next lower integer. THREADS: threads of a block; UNROLL: samples that a thread has in flight.

// VECTOR sums in memory order: one store instruction.
struct __align__(sizeof(Real) * VECTOR) Sums {
    Real element[VECTOR];
};

// Along a row of cells each voxel lies between two cells, so that its sum stays in registers until both are done. Across
// rows four cells meet at a voxel: each writes to an `edges` plane of its own, [edge][n][d][h][w][c]. A row is cut into
// segments of `segment` voxels; the cell where two segments meet is visited twice. The launch covers `depth` slices of
// the planes from `first_d` on.
//
// A block takes a run of segments, those of `band` neighbouring rows and then the next along d, so that the output
// gradients that it reads stay in the L1 cache.
extern "C" __global__ void __launch_bounds__(THREADS, 1) deform_cell_gather(
    const int* __restrict__ ids, const int* __restrict__ starts, const Scalar* __restrict__ offset,
    const Scalar* __restrict__ weight, const Scalar* __restrict__ grad, const Scalar* __restrict__ mask,
    Real* __restrict__ edges, CONVOLUTION_ARGUMENTS, int64 channels, int64 offset_n, int64 offset_c, int64 offset_v,
    int64 mask_n, int64 mask_c, int64 mask_v, int64 samples, int64 first_d, int64 depth, int64 segment, int64 band,
    int64 id_step
) {
    const Convolution v = CONVOLUTION;
    const int C = (int)channels, step = C * (int)sizeof(Scalar), each = (int)id_step;
    const int shift_c = (int)offset_c, shift_v = (int)offset_v, factor_c = (int)mask_c, factor_v = (int)mask_v;
    const int64 out_voxels = (int64)v.out_D * v.out_H * v.out_W;
    const int64 plane = samples * depth * v.H * v.W * C;
    const int segments = (v.W + (int)segment - 1) / (int)segment, bands = (v.H + (int)band) / (int)band;
    const int64 units = samples * bands * segments * (depth + 1) * band;
    const int64 last = units * (blockIdx.x + 1) / gridDim.x;
    for (int64 unit = units * blockIdx.x / gridDim.x + threadIdx.y; unit < last; unit += blockDim.y) {
        int64 rest = unit / band;
        const int near_d = (int)(rest % (depth + 1)), cell_d = (int)first_d + near_d;
        rest /= depth + 1;
        const int first_w = (int)(rest % segments) * (int)segment;
        rest /= segments;
        const int cell_h = (int)(rest % bands * band + unit % band), n = (int)(rest / bands);
        if (cell_h > v.H) continue;
        const int end_w = first_w + (int)segment < v.W ? first_w + (int)segment : v.W;
        const int* row_starts = starts + (((int64)n * (v.D + 1) + cell_d) * (v.H + 1) + cell_h) * (v.W + 2);
        const Scalar* shifts = offset + n * (offset_n - out_voxels * offset_v);
        const Scalar* factors = mask ? mask + n * (mask_n - out_voxels * mask_v) : nullptr;
        for (int c = threadIdx.x * VECTOR; c < C; c += blockDim.x * VECTOR) {
            const Scalar *grad_c = grad + c, *weight_c = weight + c;
            Real low[4][VECTOR] = {};  // sums of the voxels below the cell along w, at its four edges (2 * d + h)
            int begin = row_starts[first_w];
            for (int cell_w = first_w; cell_w <= end_w; ++cell_w) {
                Real high[4][VECTOR] = {};
                const int end = row_starts[cell_w + 1];
#pragma unroll (UNROLL)
                for (int i = begin; i < end; ++i) {
                    const unsigned id = (unsigned)ids[(int64)i * each];
                    const int voxel = (int)(id / (unsigned)v.taps), tap = (int)(id - (unsigned)voxel * (unsigned)v.taps);
                    const Scalar* at = shifts + (int64)voxel * shift_v + (int64)(3 * tap) * shift_c;
                    const Real shift_d = to_real(at[0]), shift_h = to_real(at[offset_c]), shift_w = to_real(at[2 * offset_c]);
                    const Pack direction = load(moved(grad_c, (int64)voxel * step));
                    const Pack tap_weight = load(moved(weight_c, (int64)tap * step));
                    const Real far_d = shift_d - floor_(shift_d), far_h = shift_h - floor_(shift_h);
                    Real above = shift_w - floor_(shift_w), below = 1 - above;
                    if (factors) {
                        const Real factor = to_real(factors[(int64)voxel * factor_v + (int64)tap * factor_c]);
                        above *= factor;
                        below *= factor;
                    }
                    const Real edge[4] = {
                        (1 - far_d) * (1 - far_h), (1 - far_d) * far_h, far_d * (1 - far_h), far_d * far_h
                    };
                    Real towards[VECTOR];
#pragma unroll
                    for (int e = 0; e < VECTOR; ++e) towards[e] = part(direction, e) * part(tap_weight, e);
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
                begin = end;
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const int d = near_d - 1 + (k >> 1), h = cell_h - 1 + (k & 1), w = cell_w - 1;
                    if (w >= first_w && d >= 0 && d < depth && h >= 0 && h < v.H) {
                        Sums sums;
#pragma unroll
                        for (int e = 0; e < VECTOR; ++e) sums.element[e] = low[k][e];
                        Real* to = edges + k * plane + (((n * depth + d) * v.H + h) * v.W + w) * C + c;
                        *reinterpret_cast<Sums*>(to) = sums;
                    }
#pragma unroll
                    for (int e = 0; e < VECTOR; ++e) low[k][e] = high[k][e];
                }
            }
        }
    }
}

// Adds `within` vectors per sample; samples are `step_n` elements apart in the gradient.
extern "C" __global__ void __launch_bounds__(256) deform_add_edges(
    const Real* __restrict__ edges, Scalar* __restrict__ grad_input, int64 samples, int64 within, int64 step_n
) {
    const int64 plane = samples * within;
    const Sums* from = reinterpret_cast<const Sums*>(edges);
    for (int64 i = blockIdx.x * (int64)blockDim.x + threadIdx.x; i < plane; i += gridDim.x * (int64)blockDim.x) {
        const Sums edge[4] = {from[i], from[plane + i], from[2 * plane + i], from[3 * plane + i]};
        Real sums[VECTOR];
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) {
            sums[e] = (edge[0].element[e] + edge[1].element[e]) + (edge[2].element[e] + edge[3].element[e]);
        }
        const int64 n = samples == 1 ? 0 : i / within;
        store(grad_input + n * step_n + (i - n * within) * VECTOR, sums);
    }
}
