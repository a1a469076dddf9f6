// Depthwise forward, one offset group: output[n, v, c] = bias[c] + sum over taps of weight[tap, c] * sample.
//
// A block owns a tile of output voxels. Its threads first compute the tile's sampling positions together, once for all
// channels; then each thread carries VECTOR channels of one voxel through all taps with its sums in registers.
// The bottleneck is the gather of 8 corners per tap through the L1 cache.
//
// FUSED 1: the shifts are not read but computed from the input at the output voxel, by the 1x1x1 convolution of the
// network's offset branch: the tensor of shifts never exists. The input and output grids are then the same.

struct FusedShifts {
    const Real* computed;  // [voxel][3 * taps]
    int channels;

    __device__ __forceinline__ Real operator()(int, int, int, int, int voxel, int tap, Real (&shift)[3]) const {
#pragma unroll
        for (int axis = 0; axis < 3; ++axis) shift[axis] = computed[voxel * channels + 3 * tap + axis];
        return Real(1);
    }
};

// The offset branch for a tile: computed[voxel][j] = bias[j] + sum over c of weight[c, j] * input[voxel, c].
// A thread computes four voxels of one j at a time: each load of the weight serves four products.
__device__ __forceinline__ void compute_shifts(
    const Scalar* input, const Scalar* weight, const Scalar* bias, Real* volume, Real* computed, const Tile& tile,
    const Convolution& v, int voxels, int C, int channels
) {
    int thread = threadIdx.x + threadIdx.y * blockDim.x, threads = blockDim.x * blockDim.y;
    int rows = voxels < 4 ? 4 : voxels;
    for (int i = thread; i < rows * C; i += threads) {
        int voxel = i / C, c = i % C, d, h, w;
        voxel_of(tile, voxel, d, h, w);
        bool exists = voxel < voxels && d < v.D && h < v.H && w < v.W;
        int64 at = (((int64)tile.n * v.D + d) * v.H + h) * v.W + w;
        volume[c * rows + voxel] = exists ? to_real(input[at * C + c]) : Real(0);
    }
    __syncthreads();
    for (int i = thread; i < channels * (rows / 4); i += threads) {
        int j = i % channels, voxel = i / channels * 4;
        Real start = bias ? to_real(bias[j]) : Real(0);
        Real sum[4] = {start, start, start, start};
        // Summed in parts: hundreds of terms in one sum would lose a digit.
        for (int first = 0; first < C; first += 32) {
            const int end = first + 32 < C ? first + 32 : C;
            Real part[4] = {};
            for (int c = first; c < end; ++c) {
                Real factor = to_real(weight[(int64)c * channels + j]);
                const Real* row = volume + c * rows + voxel;
#pragma unroll
                for (int k = 0; k < 4; ++k) part[k] = fma_(factor, row[k], part[k]);
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) sum[k] += part[k];
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (voxel + k < voxels) computed[(voxel + k) * channels + j] = sum[k];
        }
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(384, 2) deform_forward(
    const Scalar* __restrict__ input, const Scalar* __restrict__ offset, const Scalar* __restrict__ weight,
    const Scalar* __restrict__ bias, const Scalar* __restrict__ mask, Scalar* __restrict__ output,
    const Scalar* __restrict__ offset_weight, const Scalar* __restrict__ offset_bias, CONVOLUTION_ARGUMENTS,
    int64 channels, int64 offset_n, int64 offset_c, int64 offset_v, int64 mask_n, int64 mask_c, int64 mask_v,
    int64 tiles, int64 log_d, int64 log_h, int64 log_w, int64 taps_at_once
) {
    const Convolution v = CONVOLUTION;
    const int C = (int)channels;
    const int voxels = 1 << (int)(log_d + log_h + log_w);
    const int chunk = CUBE ? 27 : (int)taps_at_once;
    const Steps step(C, v.H, v.W);
    const int voxel = threadIdx.y;
    const int rounds = (C + VECTOR * blockDim.x - 1) / (VECTOR * blockDim.x);

    SHARED_MEMORY(shared);
    unsigned char* rest;
    const Samples samples = samples_in(shared, voxels * chunk, mask != nullptr, rest);
#if FUSED
    Real* computed = reinterpret_cast<Real*>(rest);
    const FusedShifts shifts = {computed, 3 * v.taps};
    const bool taps_first = true;
#else
    const StoredShifts shifts = {offset, mask, offset_n, offset_c, offset_v, mask_n, mask_c, mask_v, v.out_H, v.out_W};
    const bool taps_first = offset_c == 1;
#endif

    for (int64 number = blockIdx.x; number < tiles; number += gridDim.x) {
        const Tile tile = tile_at(number, v.out_D, v.out_H, v.out_W, (int)log_d, (int)log_h, (int)log_w);
        int d, h, w;
        voxel_of(tile, voxel, d, h, w);
        const bool exists = d < v.out_D && h < v.out_H && w < v.out_W;
        const Scalar* sample_n = moved(input, (int64)tile.n * v.D * step.d);
#if FUSED
        __syncthreads();  // the samples of the previous tile have been read
        Real* volume = computed + voxels * 3 * v.taps;
        compute_shifts(input, offset_weight, offset_bias, volume, computed, tile, v, voxels, C, 3 * v.taps);
#endif
        for (int round = 0; round < rounds; ++round) {
            const int c = (round * blockDim.x + threadIdx.x) * VECTOR;
            const bool works = exists && c < C;
            Real sum[VECTOR] = {};
            for (int first = 0; first < v.taps; first += chunk) {
                const int count = CUBE ? 27 : (v.taps - first < chunk ? v.taps - first : chunk);
                if (round == 0 || v.taps > chunk) {
                    __syncthreads();
                    compute_samples(samples, v, tile, voxels, first, count, chunk, taps_first, shifts);
                    __syncthreads();
                }
                if (!works) continue;
                const Scalar* origin = sample_n + c;
                const Scalar* tap_weights = weight + (int64)first * C + c;
                const int slot = voxel * chunk;
                // Only if the number of taps is known: otherwise NVRTC 13 drops the check between the copies and runs
                // up to two taps too many.
#if CUBE
#pragma unroll 3
#else
#pragma unroll 1
#endif
                for (int tap = 0; tap < count; ++tap) {
                    const unsigned inside = samples.inside[slot + tap];
                    if (!inside) continue;
                    const Sample s = samples.at[slot + tap];
                    Pack corner[8];
                    load_corners(origin, s.base, inside, step, corner);
                    const Pack tap_weight = load(moved(tap_weights, (int64)tap * step.w));
                    Real trilinear[8];
                    corner_weights(s, trilinear);
                    if (samples.factor) {
#pragma unroll
                        for (int k = 0; k < 8; ++k) trilinear[k] *= samples.factor[slot + tap];
                    }
#pragma unroll
                    for (int i = 0; i < VECTOR; ++i) {
                        Real value = trilinear[0] * part(corner[0], i);
#pragma unroll
                        for (int k = 1; k < 8; ++k) value = fma_(trilinear[k], part(corner[k], i), value);
                        sum[i] = fma_(part(tap_weight, i), value, sum[i]);
                    }
                }
            }
            if (works) {
                if (bias) {
                    const Pack start = load(bias + c);
#pragma unroll
                    for (int i = 0; i < VECTOR; ++i) sum[i] += part(start, i);
                }
                const int64 at = (((int64)tile.n * v.out_D + d) * v.out_H + h) * v.out_W + w;
                store(output + at * C + c, sum);
            }
        }
    }
}
