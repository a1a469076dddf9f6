// Depthwise backward of the sampling, 3x3x3 and one offset group, for channels that divide evenly among a few lanes.
//
// It computes the same as `deform_backward_samples`, for C = LANES * ROUNDS * VECTOR. A warp takes one tap through the
// voxels of a tile, with LANES neighbouring lanes per voxel and ROUNDS vectors of channels per lane: the position, the
// addresses and the weights of a sample are computed once for all of them. Sums over channels stay in registers over the
// rounds and are reduced once. Warps share nothing but the L1 cache: no warp waits for another.
//
// A block walks a run of neighbouring tiles, so that the voxels they share stay in the L1 cache. A warp has the same taps
// in every tile, and a row of `partial` belongs to one part of one block: no atomics, and a fixed order of the sums.
//
// Four or eight slots of a quarter warp read pieces of voxels at once. If a voxel has an odd number of pieces, a sample
// reads its two corners along w in the order that keeps neighbouring slots in different memory banks; if the number is
// even, odd slots take the rounds in another order.
//
// With `counts`, the samples of each cell are counted as well, and each sample's cell is stored: see backward_sort.cu.

constexpr int SLOTS = 32 / LANES, CHANNELS = LANES * ROUNDS * VECTOR, VOXEL_BYTES = CHANNELS * sizeof(Scalar);
constexpr int PIECE_BYTES = LANES * VECTOR * sizeof(Scalar);
constexpr bool ODD_PIECES = PIECE_BYTES < 128 && ROUNDS % 2 == 1;
constexpr bool EVEN_PIECES = PIECE_BYTES < 128 && ROUNDS % 2 == 0;
constexpr unsigned SLOT_BITS = SLOTS == 32 ? 0xffffffffu : (1u << SLOTS % 32) - 1;

// Tile `number` of a walk along d first: neighbours along that axis share the most voxels.
__device__ __forceinline__ Tile walked_tile(
    int64 number, int size_D, int size_H, int size_W, int log_d, int log_h, int log_w
) {
    const int along_w = (size_W + (1 << log_w) - 1) >> log_w, along_h = (size_H + (1 << log_h) - 1) >> log_h;
    const int along_d = (size_D + (1 << log_d) - 1) >> log_d;
    Tile tile;
    tile.log_h = log_h;
    tile.log_w = log_w;
    tile.d = (int)(number % along_d) << log_d;
    number /= along_d;
    tile.w = (int)(number % along_w) << log_w;
    number /= along_w;
    tile.h = (int)(number % along_h) << log_h;
    tile.n = (int)(number / along_h);
    return tile;
}

// The task of a warp: one tap of a tile. It is in shared memory, because registers are needed elsewhere.
struct Task {
    int number, end, tap;
    int first;       // the first of the 32 voxels in progress
    unsigned whole;  // a bit for each of them: all corners are inside the volume
    Tile tile;
};

// A warp's samples of one tap and 32 voxels.
struct WarpSamples {
    Sample at[32];
    Real factor[32];
    int voxel[32];            // voxel number over all samples, -1 beyond the tile or the volume
    unsigned char inside[32];
    Task task;
};

// The place of a lane in its warp: lane `lane` of slot `slot`, and the channels that it takes.
struct Lane {
    int number, slot, lane;

    __device__ __forceinline__ int channel(int round) const {
        return ((EVEN_PIECES ? round ^ (slot & 1) : round) * LANES + lane) * VECTOR;
    }
};

// The dot products of a sample's corners with the gradient that reaches them, and its part of the weight's gradient.
// WHOLE: all corners are inside the volume.
template <bool WHOLE>
__device__ __forceinline__ void sample_gradients(
    const Lane& me, const Scalar* input, const Scalar* direction, const Sample& s, unsigned inside, Real factor,
    const Steps& step, const Pack (&tap_weight)[ROUNDS], Real (&grad_weight)[ROUNDS][VECTOR], Real (&slope)[4],
    bool with_product
) {
    const bool flip = WHOLE && ODD_PIECES && ((s.base ^ me.slot) & 1);
    const Real w1 = flip ? 1 - s.w : s.w, w0 = flip ? s.w : 1 - s.w, h0 = 1 - s.h, d0 = 1 - s.d;
    const Real across[4] = {d0 * h0, d0 * s.h, s.d * h0, s.d * s.h};
    Real trilinear[8], dot[8] = {};
#pragma unroll
    for (int k = 0; k < 8; ++k) trilinear[k] = across[k / 2] * (k & 1 ? w1 : w0);
    const int along_w = flip ? -VOXEL_BYTES : VOXEL_BYTES;
    const Scalar* corner_at[8];
    corner_at[0] = moved(input, (int64)(s.base + flip) * VOXEL_BYTES);
    corner_at[2] = moved(corner_at[0], step.h);
    corner_at[4] = moved(corner_at[0], step.d);
    corner_at[6] = moved(corner_at[2], step.d);
#pragma unroll
    for (int k = 1; k < 8; k += 2) corner_at[k] = moved(corner_at[k - 1], along_w);
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        const int c = me.channel(round);
        Pack corner[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            if (WHOLE) {
                corner[k] = load(corner_at[k] + c);
            } else {
                // Corners outside are not read: zero times their value could be NaN.
                corner[k] = nothing();
                if (inside >> k & 1u) corner[k] = load(corner_at[k] + c);
            }
        }
        const Pack towards = load(direction + c);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            const Real pull = part(towards, i) * part(tap_weight[round], i);
            Real value = 0;
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                const Real x = part(corner[k], i);
                value = k ? fma_(trilinear[k], x, value) : trilinear[k] * x;
                dot[k] = fma_(pull, x, dot[k]);
            }
            grad_weight[round][i] = fma_(part(towards, i) * factor, value, grad_weight[round][i]);
        }
    }
    Real difference[4], along[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        difference[k] = dot[2 * k + 1] - dot[2 * k];
        along[k] = w0 * dot[2 * k] + w1 * dot[2 * k + 1];
    }
    slope[0] = h0 * (along[2] - along[0]) + s.h * (along[3] - along[1]);
    slope[1] = d0 * (along[1] - along[0]) + s.d * (along[3] - along[2]);
    slope[2] = across[0] * difference[0] + across[1] * difference[1] + across[2] * difference[2] + across[3] * difference[3];
    if (flip) slope[2] = -slope[2];
    slope[3] = 0;
    if (with_product) {
#pragma unroll
        for (int k = 0; k < 4; ++k) slope[3] = fma_(across[k], along[k], slope[3]);
#pragma unroll
        for (int axis = 0; axis < 3; ++axis) slope[axis] *= factor;
    }
}

// Sums `values` over the lanes of a slot, dividing them among the lanes as it goes: returns the number of values that a
// lane ends with, from number `first` on.
__device__ __forceinline__ int sum_slot(Real (&values)[4], int lane, int& first) {
    int held = 4;
    first = 0;
#pragma unroll
    for (int other = LANES / 2; other; other /= 2) {
        if (held > 1) {
            held /= 2;
            const bool upper = lane & other;
            first += upper ? held : 0;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (i >= held) continue;
                const Real kept = upper ? values[i + held] : values[i], given = upper ? values[i] : values[i + held];
                values[i] = kept + __shfl_xor_sync(0xffffffffu, given, other);
            }
        } else {
            values[0] += __shfl_xor_sync(0xffffffffu, values[0], other);
        }
    }
    return held;
}

// Writes the sum over a warp's slots of its lanes' channels to a row of C. Each stage halves the values that a lane
// holds, as long as their number is even.
__device__ __forceinline__ void write_row(const Real (&sums)[ROUNDS][VECTOR], const Lane& me, Real* row) {
    constexpr bool PAIRS = EVEN_PIECES && SLOTS > 1;
    Real held_sums[ROUNDS * VECTOR];
    int held = PAIRS ? ROUNDS * VECTOR / 2 : ROUNDS * VECTOR, first = 0;
#pragma unroll
    for (int i = 0; i < ROUNDS * VECTOR; ++i) {
        if (i >= held) continue;
        if (PAIRS) {
            // Neighbouring slots take a pair of rounds in opposite order: each keeps the one that it takes first.
            const int round = i / VECTOR * 2 % ROUNDS;
            const Real given = __shfl_xor_sync(0xffffffffu, sums[(round + 1) % ROUNDS][i % VECTOR], LANES);
            held_sums[i] = sums[round][i % VECTOR] + given;
        } else {
            held_sums[i] = sums[i / VECTOR][i % VECTOR];
        }
    }
    bool writes = true;
#pragma unroll
    for (int other = 16; other >= (PAIRS ? 2 * LANES : LANES); other /= 2) {
        const bool halves = held % 2 == 0, upper = me.number & other;
        if (halves) {
            held /= 2;
            first += upper ? held : 0;
        } else {
            writes = writes && !upper;
        }
#pragma unroll
        for (int i = 0; i < ROUNDS * VECTOR; ++i) {
            if (i >= held) continue;
            const int pair = (i + held) % (ROUNDS * VECTOR);
            const Real kept = halves && upper ? held_sums[pair] : held_sums[i];
            const Real given = halves && !upper ? held_sums[pair] : held_sums[i];
            held_sums[i] = kept + __shfl_xor_sync(0xffffffffu, given, other);
        }
    }
    if (!writes) return;
#pragma unroll
    for (int i = 0; i < ROUNDS * VECTOR; ++i) {
        if (i >= held) continue;
        const int number = first + i, round = number / VECTOR * (PAIRS ? 2 : 1);
        row[me.channel(round) + number % VECTOR] = held_sums[i];
    }
}

// Finds the samples of a tap for 32 voxels of the tile, one per lane.
__device__ __forceinline__ void find_samples(
    WarpSamples& own, const Lane& me, const Convolution& v, const StoredShifts& shifts, int voxels, int* counts,
    int* cells, int64 samples
) {
    const Tile tile = own.task.tile;
    int d, h, w, voxel = -1, cell = -1;
    voxel_of(tile, own.task.first + me.number, d, h, w);
    Sample s = {};
    Real factor = 1;
    unsigned inside = 0;
    if (own.task.first + me.number < voxels && d < v.out_D && h < v.out_H && w < v.out_W) {
        int low_d, low_h, low_w;
        Real shift[3];
        factor = shifts(tile.n, d, h, w, 0, own.task.tap, shift);
        inside = locate(v, d, h, w, own.task.tap, shift[0], shift[1], shift[2], s, low_d, low_h, low_w);
        s.base += tile.n * v.D * v.H * v.W;
        voxel = ((tile.n * v.out_D + d) * v.out_H + h) * v.out_W + w;
        if (inside) cell = ((tile.n * (v.D + 1) + low_d + 1) * (v.H + 1) + low_h + 1) * (v.W + 2) + low_w + 1;
    }
    own.at[me.number] = s;
    own.factor[me.number] = factor;
    own.voxel[me.number] = voxel;
    if (counts && voxel >= 0) {
        if (inside) atomicAdd(counts + cell, 1);
        cells[own.task.tap * samples * v.out_D * v.out_H * v.out_W + voxel] = cell;
    }
    own.inside[me.number] = (unsigned char)inside;
    unsigned whole = (inside == 0xffu ? 1u : 0u) << me.number;
#pragma unroll
    for (int other = 16; other; other /= 2) whole |= __shfl_xor_sync(0xffffffffu, whole, other);
    if (me.number == 0) own.task.whole = whole;
    __syncwarp();
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 16 / WARPS) deform_backward_taps(
    const Scalar* __restrict__ input, const Scalar* __restrict__ offset, const Scalar* __restrict__ weight,
    const Scalar* __restrict__ mask, const Scalar* __restrict__ grad, Scalar* __restrict__ grad_offset,
    Scalar* __restrict__ grad_mask, Real* __restrict__ partial, int* __restrict__ counts, int* __restrict__ cells,
    CONVOLUTION_ARGUMENTS, int64 offset_n, int64 offset_c, int64 offset_v, int64 mask_n, int64 mask_c, int64 mask_v,
    int64 samples, int64 tiles, int64 log_d, int64 log_h, int64 log_w, int64 with_bias
) {
    const Convolution v = CONVOLUTION;
    const Steps step(CHANNELS, v.H, v.W);
    const int lane_number = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Lane me = {lane_number, lane_number / LANES, lane_number % LANES};
    const int voxels = 1 << (int)(log_d + log_h + log_w);
    const int out_voxels = v.out_D * v.out_H * v.out_W;
    const StoredShifts shifts = {offset, mask, offset_n, offset_c, offset_v, mask_n, mask_c, mask_v, v.out_H, v.out_W};
    SHARED_MEMORY(shared);
    WarpSamples& own = reinterpret_cast<WarpSamples*>(shared)[warp];

    // A task is a tap of a tile, or the bias's gradient of the tile, which follows the taps.
    const int rows = v.taps + (with_bias ? 1 : 0);
    if (me.number == 0) {
        own.task.number = (int)(tiles * rows * blockIdx.x / gridDim.x) + warp;
        own.task.end = (int)(tiles * rows * (blockIdx.x + 1) / gridDim.x);
    }
    __syncwarp();
    while (own.task.number < own.task.end) {
        if (me.number == 0) {
            own.task.tap = own.task.number % rows;
            own.task.first = 0;
            const int64 tile = own.task.number / rows;
            own.task.tile = walked_tile(tile, v.out_D, v.out_H, v.out_W, (int)log_d, (int)log_h, (int)log_w);
        }
        __syncwarp();
        Real sums[ROUNDS][VECTOR] = {};
        if (own.task.tap < v.taps) {
            Pack tap_weight[ROUNDS];
#pragma unroll
            for (int round = 0; round < ROUNDS; ++round) {
                tap_weight[round] = load(weight + own.task.tap * CHANNELS + me.channel(round));
            }
            while (own.task.first < voxels) {
                find_samples(own, me, v, shifts, voxels, counts, cells, samples);
                const int count = voxels < 32 ? voxels : 32;  // both are powers of two
#pragma unroll 1
                for (int pass = 0; pass < count; pass += SLOTS) {
                    const int at = pass + me.slot;
                    const Sample s = own.at[at];
                    const Scalar* direction = moved(grad, (int64)own.voxel[at] * VOXEL_BYTES);
                    Real slope[4] = {};
                    if ((own.task.whole >> pass & SLOT_BITS) == SLOT_BITS) {
                        sample_gradients<true>(
                            me, input, direction, s, 0xffu, own.factor[at], step, tap_weight, sums, slope,
                            mask != nullptr
                        );
                    } else if (own.inside[at]) {
                        sample_gradients<false>(
                            me, input, direction, s, own.inside[at], own.factor[at], step, tap_weight, sums, slope,
                            mask != nullptr
                        );
                    }
                    int axis;
                    const int held = sum_slot(slope, me.lane, axis);
                    if (own.voxel[at] < 0 || (LANES > 4 && me.lane % (LANES > 4 ? LANES / 4 : 1))) continue;
                    const int n = own.task.tile.n, tap = own.task.tap;
                    const int64 voxel = own.voxel[at] - n * out_voxels;
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        if (i >= held) continue;
                        if (axis + i < 3) {
                            const int64 channel = 3 * tap + axis + i;
                            if (grad_offset) {
                                grad_offset[n * offset_n + voxel * offset_v + channel * offset_c] = to_scalar(slope[i]);
                            }
                        } else if (grad_mask) {
                            grad_mask[n * mask_n + voxel * mask_v + tap * mask_c] = to_scalar(slope[i]);
                        }
                    }
                }
                __syncwarp();
                if (me.number == 0) own.task.first += 32;
                __syncwarp();
            }
        } else {
            const Tile tile = own.task.tile;
            for (int at = me.slot; at < voxels; at += SLOTS) {
                int d, h, w;
                voxel_of(tile, at, d, h, w);
                if (d >= v.out_D || h >= v.out_H || w >= v.out_W) continue;
                const Scalar* direction = moved(
                    grad, (int64)(tile.n * out_voxels + (d * v.out_H + h) * v.out_W + w) * VOXEL_BYTES
                );
#pragma unroll
                for (int round = 0; round < ROUNDS; ++round) {
                    const Pack towards = load(direction + me.channel(round));
#pragma unroll
                    for (int i = 0; i < VECTOR; ++i) sums[round][i] += part(towards, i);
                }
            }
        }
        if (partial) write_row(sums, me, partial + (int64)own.task.number * CHANNELS);
        __syncwarp();
        if (me.number == 0) own.task.number += WARPS;
        __syncwarp();
    }
}
