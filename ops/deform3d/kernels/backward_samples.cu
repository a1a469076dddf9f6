// Depthwise backward of the sampling, one offset group: the gradients of offset, mask and weight.
//
// A warp takes one tap at a time through all voxels of the block's tile. Its lanes are divided into slots: LANES
// neighbouring lanes (a power of two) share a voxel and divide its channels. A lane sums the weight gradient of its
// channels over the voxels in registers; the lanes of a slot sum the offset's gradient over the channels by shuffles.
// Only one warp handles a tap of a tile, and a block writes its own row of `partial`: nothing needs an atomic, and the
// order of the sums is fixed.

__device__ __forceinline__ Real sum_over(Real value, int from, int to) {
    for (int lane = from; lane < to; lane *= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
    return value;
}

extern "C" __global__ void __launch_bounds__(288, 2) deform_backward_samples(
    const Scalar* __restrict__ input, const Scalar* __restrict__ offset, const Scalar* __restrict__ weight,
    const Scalar* __restrict__ mask, const Scalar* __restrict__ grad, Scalar* __restrict__ grad_offset,
    Scalar* __restrict__ grad_mask, Real* __restrict__ partial, CONVOLUTION_ARGUMENTS, int64 channels, int64 offset_n,
    int64 offset_c, int64 offset_v, int64 mask_n, int64 mask_c, int64 mask_v, int64 tiles, int64 log_d, int64 log_h,
    int64 log_w, int64 taps_at_once, int64 lanes_per_voxel
) {
    const Convolution v = CONVOLUTION;
    const int C = (int)channels;
    const int voxels = 1 << (int)(log_d + log_h + log_w);
    const int chunk = CUBE ? 27 : (int)taps_at_once;
    const Steps step(C, v.H, v.W);
    const int lanes = (int)lanes_per_voxel, slots = 32 / lanes;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int slot_voxel = threadIdx.x % 32 / lanes, lane = threadIdx.x % lanes;
    const int rounds = (C + VECTOR * lanes - 1) / (VECTOR * lanes);
    const int passes = (voxels + slots - 1) / slots;

    SHARED_MEMORY(shared);
    unsigned char* rest;
    const Samples samples = samples_in(shared, voxels * chunk, mask != nullptr, rest);
    Real* slopes = reinterpret_cast<Real*>(rest);                     // [voxel][tap][axis]
    Real* products = mask ? slopes + 3 * voxels * chunk : nullptr;    // [voxel][tap]
    const StoredShifts shifts = {offset, mask, offset_n, offset_c, offset_v, mask_n, mask_c, mask_v, v.out_H, v.out_W};
    const bool taps_first = offset_c == 1;

    for (int64 number = blockIdx.x; number < tiles; number += gridDim.x) {
        const Tile tile = tile_at(number, v.out_D, v.out_H, v.out_W, (int)log_d, (int)log_h, (int)log_w);
        const Scalar* sample_n = moved(input, (int64)tile.n * v.D * step.d);
        const Scalar* grad_n = moved(grad, (int64)tile.n * v.out_D * v.out_H * v.out_W * step.w);
        for (int first = 0; first < v.taps; first += chunk) {
            const int count = CUBE ? 27 : (v.taps - first < chunk ? v.taps - first : chunk);
            __syncthreads();
            compute_samples(samples, v, tile, voxels, first, count, chunk, taps_first, shifts);
            __syncthreads();
            for (int tap = warp; tap < count; tap += warps) {
                for (int round = 0; round < rounds; ++round) {
                    const int c = (round * lanes + lane) * VECTOR;
                    const bool has_channels = c < C;
                    Pack tap_weight = has_channels ? load(weight + (int64)(first + tap) * C + c) : nothing();
                    Real grad_weight[VECTOR] = {};
                    for (int pass = 0; pass < passes; ++pass) {
                        const int voxel = pass * slots + slot_voxel, slot = voxel * chunk + tap;
                        const unsigned inside = voxel < voxels && has_channels ? samples.inside[slot] : 0u;
                        Real slope[3] = {}, product = 0;
                        if (inside) {
                            int d, h, w;
                            voxel_of(tile, voxel, d, h, w);
                            const int at = (d * v.out_H + h) * v.out_W + w;
                            const Sample s = samples.at[slot];
                            Pack corner[8];
                            load_corners(sample_n + c, s.base, inside, step, corner);
                            const Pack direction = load(moved(grad_n + c, (int64)at * step.w));
                            const Real factor = samples.factor ? samples.factor[slot] : Real(1);
                            Real trilinear[8], dot[8] = {};
                            corner_weights(s, trilinear);
#pragma unroll
                            for (int i = 0; i < VECTOR; ++i) {
                                const Real towards = part(direction, i), pull = towards * part(tap_weight, i);
                                Real value = 0;
#pragma unroll
                                for (int k = 0; k < 8; ++k) {
                                    const Real x = part(corner[k], i);
                                    value = fma_(trilinear[k], x, value);
                                    dot[k] = fma_(pull, x, dot[k]);
                                }
                                grad_weight[i] = fma_(towards * factor, value, grad_weight[i]);
                            }
                            slopes_of(dot, s, slope);
                            if (products) {
#pragma unroll
                                for (int k = 0; k < 8; ++k) product = fma_(trilinear[k], dot[k], product);
#pragma unroll
                                for (int axis = 0; axis < 3; ++axis) slope[axis] *= factor;
                            }
                        }
#pragma unroll
                        for (int axis = 0; axis < 3; ++axis) slope[axis] = sum_over(slope[axis], 1, lanes);
                        if (products) product = sum_over(product, 1, lanes);
                        if (lane == 0 && voxel < voxels) {
#pragma unroll
                            for (int axis = 0; axis < 3; ++axis) {
                                Real* total = slopes + 3 * slot + axis;
                                *total = round ? *total + slope[axis] : slope[axis];
                            }
                            if (products) products[slot] = round ? products[slot] + product : product;
                        }
                    }
                    if (partial) {
#pragma unroll
                        for (int i = 0; i < VECTOR; ++i) grad_weight[i] = sum_over(grad_weight[i], lanes, 32);
                        if (slot_voxel == 0 && has_channels) {
                            Real* row = partial + ((int64)blockIdx.x * v.taps + first + tap) * C + c;
#pragma unroll
                            for (int i = 0; i < VECTOR; ++i) row[i] += grad_weight[i];
                        }
                    }
                }
            }
            __syncthreads();
            for (int i = threadIdx.x; i < voxels * count; i += blockDim.x) {
                const int voxel = taps_first ? i / count : i % voxels, tap = taps_first ? i % count : i / voxels;
                int d, h, w;
                voxel_of(tile, voxel, d, h, w);
                if (d >= v.out_D || h >= v.out_H || w >= v.out_W) continue;
                const int slot = voxel * chunk + tap;
                const int64 at = ((int64)d * v.out_H + h) * v.out_W + w;
                if (grad_offset) {
                    Scalar* to = grad_offset + tile.n * offset_n + at * offset_v + 3 * (first + tap) * offset_c;
#pragma unroll
                    for (int axis = 0; axis < 3; ++axis) to[axis * offset_c] = to_scalar(slopes[3 * slot + axis]);
                }
                if (grad_mask) {
                    grad_mask[tile.n * mask_n + at * mask_v + (first + tap) * mask_c] = to_scalar(products[slot]);
                }
            }
        }
    }
}
