// Depthwise 3x3x3 forward for the presets' channels: the sums of `deform_forward`, by persistent blocks.
//
// One block per multiprocessor walks a run of neighbouring tiles, so that the voxels that two tiles share are still in
// the L1 cache: nine of ten misses of a grid of small blocks are of that kind. Its threads form groups, each with its own
// barrier, that take the tiles in turn: while one group computes sampling positions, the others gather. A gather is
// served for eight threads at a time, in one step if they read different banks. If a voxel's channels do not fill whole
// lines of 128 bytes, its neighbours w and w + 1 are read in the order that avoids conflicts most often.
//
// Every corner is loaded without a test: a corner outside the volume repeats one inside with weight 0, and a sample
// entirely outside reads the first voxel with weight 0. The sum is the same as long as it is finite. A voxel whose sum is
// not finite is computed again as in `deform_forward`, from the corners inside alone.
//
// Corners are summed in float32, except for float16: four corners at a time in float16, two channels at once. On an H200
// this takes 0.32 ms instead of 0.37 (two samples of 48 x 48 x 48 voxels, 48 channels), with a relative error of 4e-4
// instead of 2e-4. The same for bfloat16 gains 2 %, with a larger error; the tensor cores are slower for both.
//
//   CHANNELS  channels of the volume; a multiple of VECTOR, with 16 bytes per VECTOR

#ifdef DEFORM3D_EMULATED
#define GROUP_BARRIER(number, threads) emulated::synchronize_group(number, threads, __LINE__)
#define COMPUTE_HERE(value)
#else
#define GROUP_BARRIER(number, threads) asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(threads) : "memory")
// Stops the compiler from computing values derived from `value` before the loop, in registers that the gather needs.
#define COMPUTE_HERE(value) asm volatile("" : "+r"(value))
#endif

constexpr int VOXEL_BYTES = CHANNELS * sizeof(Scalar);
constexpr int LANES = CHANNELS / VECTOR;  // threads that share one voxel
constexpr int THREADS = 768;
constexpr int GROUP = LANES % 3 ? 128 : 192;
constexpr int GROUPS = THREADS / GROUP;
constexpr int VOXELS = GROUP / LANES;  // of a tile
static_assert(sizeof(Pack) == 16 && CHANNELS % VECTOR == 0, "a thread loads 16 bytes");
static_assert(GROUP % LANES == 0 && (VOXELS & (VOXELS - 1)) == 0, "a tile's sides are powers of two");

__device__ constexpr int logarithm(int value) { return value > 1 ? 1 + logarithm(value / 2) : 0; }
constexpr int LOG_VOXELS = logarithm(VOXELS);
constexpr int LOG_W = LOG_VOXELS > 2 ? 2 : (LOG_VOXELS + 1) / 2;
constexpr int LOG_H = LOG_VOXELS > 3 ? 2 : LOG_VOXELS - LOG_W;
constexpr int LOG_D = LOG_VOXELS - LOG_W - LOG_H;

// The number of taps with samples in shared memory together: fewer if a group has many voxels, because shared memory
// is taken from the L1 cache.
constexpr int TAPS_AT_ONCE = LANES < 6 ? 3 : 9;
constexpr int SAMPLES = VOXELS * TAPS_AT_ONCE;
constexpr int SAMPLES_EACH = (SAMPLES + GROUP - 1) / GROUP;  // samples that a thread computes

// 16-bit channels need twice the registers: an unrolled loop would not fit.
constexpr int TAPS_UNROLLED = DTYPE == 2 ? 3 : 1;

// The address bit in which the two orders of reading w and w + 1 differ; 7 if none matters: voxels of whole lines.
constexpr int ORDER_BIT = VOXEL_BYTES % 128 == 0 ? 7 : VOXEL_BYTES % 64 == 0 ? 6 : VOXEL_BYTES % 32 == 0 ? 5 : 4;
// Threads of two voxels that are served together read different parts of one tap's weights. If these are in the same
// banks, every second voxel reads a copy that is 64 bytes further on.
constexpr int WEIGHT_COPIES = VOXEL_BYTES > 128 && VOXEL_BYTES % 128 == 64 ? 2 : 1;
constexpr int WEIGHT_BYTES = 27 * VOXEL_BYTES;
constexpr int COPY_BYTES = WEIGHT_COPIES == 1 ? WEIGHT_BYTES : (WEIGHT_BYTES + 127) / 128 * 128 + 64;

// The distances along d and h from the lower corners, and the weights of the voxels read first and second along w, which
// include the mask.
struct __align__(16) Cell {
    float d, h, first, second;
};

// The layout of shared memory; the launcher requests the same amount.
struct Workspace {
    unsigned char* weights;  // [copy][tap][channel]
    Cell* cells;             // [group][voxel][tap]
    // Per cell, the byte offset within its sample of the voxel read first; bits 0 and 1 hold the step to the second
    // along w, -1, 0 or 1; bits 2 and 3 whether there are steps along h and d. A step of 0 repeats a corner.
    unsigned* places;
    int* taken;  // tiles of the block's run taken so far
    int* tile;   // [group]: its current tile
};

__device__ __forceinline__ Workspace workspace_in(unsigned char* shared) {
    Workspace work;
    work.weights = shared;
    work.cells = reinterpret_cast<Cell*>(shared + (WEIGHT_COPIES * COPY_BYTES + 127) / 128 * 128);
    work.places = reinterpret_cast<unsigned*>(work.cells + GROUPS * SAMPLES);
    work.taken = reinterpret_cast<int*>(work.places + GROUPS * SAMPLES);
    work.tile = work.taken + 1;
    return work;
}

// Walks along d first: a tile is thin along d, so that samples of neighbours overlap most.
__device__ __forceinline__ Tile walked_tile(int number, int D, int H, int W) {
    int along_d = (D + (1 << LOG_D) - 1) >> LOG_D;
    int along_w = (W + (1 << LOG_W) - 1) >> LOG_W;
    int along_h = (H + (1 << LOG_H) - 1) >> LOG_H;
    Tile tile;
    tile.log_h = LOG_H;
    tile.log_w = LOG_W;
    tile.d = number % along_d << LOG_D;
    number /= along_d;
    tile.w = number % along_w << LOG_W;
    number /= along_w;
    tile.h = number % along_h << LOG_H;
    tile.n = number / along_h;
    return tile;
}

// One axis of a cell: keeps the corners inside. If one of two is outside, `scale` takes its weight out, and the other
// counts in full. Returns whether there is a step to a second corner.
__device__ __forceinline__ bool clamp_axis(int& low, int size, float& fraction, float& scale) {
    if (low >= 0 && low + 1 < size) return true;
    scale *= low < 0 ? fraction : 1 - fraction;
    low = low < 0 ? 0 : low;
    fraction = 0;
    return false;
}

// The cell of a tap of voxel (d, h, w) after a shift, for the threads of the tile's voxel `slot`.
__device__ __forceinline__ unsigned place_cell(
    const Convolution& v, int d, int h, int w, int tap, const float (&shift)[3], float factor, int slot, Cell& cell
) {
    int low_d = 0, low_h = 0, low_w = 0;
    float along_w;
    bool near = place(shift[0], d - 1 + tap / 9, v.D, cell.d, low_d);
    near = place(shift[1], h - 1 + tap / 3 % 3, v.H, cell.h, low_h) && near;
    near = place(shift[2], w - 1 + tap % 3, v.W, along_w, low_w) && near;
    if (!near) {
        cell = {0, 0, 0 * factor, 0 * factor};  // NaN if the mask is not finite
        return 0;
    }
    unsigned bits = clamp_axis(low_d, v.D, cell.d, factor) ? 8u : 0u;
    bits |= clamp_axis(low_h, v.H, cell.h, factor) ? 4u : 0u;
    const bool two = clamp_axis(low_w, v.W, along_w, factor);
    unsigned at = (unsigned)((low_d * v.H + low_h) * v.W + low_w) * VOXEL_BYTES;
    const bool swap = two && ORDER_BIT < 7 && ((at >> ORDER_BIT ^ (unsigned)slot) & 1u);
    const float lower = (1 - along_w) * factor, upper = along_w * factor;
    cell.first = swap ? upper : lower;
    cell.second = swap ? lower : upper;
    if (swap) at += VOXEL_BYTES;
    return at | bits | (swap ? 3u : two ? 1u : 0u);
}

// The weights of the corners that load_cell reads, in its order.
__device__ __forceinline__ void cell_weights(const Cell& cell, float (&weight)[8]) {
    const float first_h = cell.h * cell.first, second_h = cell.h * cell.second;
    const float first = cell.first - first_h, second = cell.second - second_h;
    weight[4] = cell.d * first;
    weight[5] = cell.d * second;
    weight[6] = cell.d * first_h;
    weight[7] = cell.d * second_h;
    weight[0] = first - weight[4];
    weight[1] = second - weight[5];
    weight[2] = first_h - weight[6];
    weight[3] = second_h - weight[7];
}

__device__ __forceinline__ void load_cell(
    const Scalar* origin, unsigned where, unsigned row, unsigned plane, Pack (&corner)[8]
) {
    const int64 step = ((int)(where << 30) >> 30) * VOXEL_BYTES;
    const unsigned along_h = where & 4u ? row : 0, along_d = where & 8u ? plane : 0;
    const Scalar* lowest = moved(origin, where & ~15u);
#pragma unroll
    for (int k = 0; k < 8; k += 2) {
        const Scalar* far = k & 4 ? moved(lowest, along_d) : lowest;
        const Scalar* first = k & 2 ? moved(far, along_h) : far;
        corner[k] = load(first);
        corner[k + 1] = load(moved(first, step));
    }
}

// sum += tap_weight * (sum over corners of weight * corner)
#if DTYPE != 0
__device__ __forceinline__ void add_tap(
    const Cell& cell, const Pack (&corner)[8], const Pack& tap_weight, Real (&sum)[VECTOR]
) {
    float weight[8];
    cell_weights(cell, weight);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
        float value = weight[0] * part(corner[0], i);
#pragma unroll
        for (int k = 1; k < 8; ++k) value = fma_(weight[k], part(corner[k], i), value);
        sum[i] = fma_(part(tap_weight, i), value, sum[i]);
    }
}
#else
// Two channels at once, each sum rounded to 16 bits.
#ifdef DEFORM3D_EMULATED
__device__ __forceinline__ unsigned multiply_add_pairs(unsigned a, unsigned b, unsigned c) {
    unsigned result = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const float factors = real_from_bits((unsigned short)(a >> shift)) * real_from_bits((unsigned short)(b >> shift));
        result |= (unsigned)bits_from_real(factors + real_from_bits((unsigned short)(c >> shift))) << shift;
    }
    return result;
}
__device__ __forceinline__ unsigned twice(float value) { return bits_from_real(value) * 0x10001u; }
#else
__device__ __forceinline__ unsigned multiply_add_pairs(unsigned a, unsigned b, unsigned c) {
    unsigned result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}
__device__ __forceinline__ unsigned twice(float value) {
    const unsigned short bits = bits_from_real(value);
    unsigned result;
    asm("mov.b32 %0, {%1, %1};" : "=r"(result) : "h"(bits));
    return result;
}
#endif
__device__ __forceinline__ float lower_part(unsigned pair) { return real_from_bits((unsigned short)(pair & 0xffffu)); }
__device__ __forceinline__ float upper_part(unsigned pair) { return real_from_bits((unsigned short)(pair >> 16)); }

__device__ __forceinline__ void add_tap(
    const Cell& cell, const Pack (&corner)[8], const Pack& tap_weight, Real (&sum)[VECTOR]
) {
    float weight[8];
    unsigned factor[8];
    cell_weights(cell, weight);
#pragma unroll
    for (int k = 0; k < 8; ++k) factor[k] = twice(weight[k]);
#pragma unroll
    for (int i = 0; i < VECTOR / 2; ++i) {
        unsigned near = 0, far = 0;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            near = multiply_add_pairs(factor[k], corner[k].pair[i], near);
            far = multiply_add_pairs(factor[k + 4], corner[k + 4].pair[i], far);
        }
        const float lower = lower_part(near) + lower_part(far), upper = upper_part(near) + upper_part(far);
        sum[2 * i] = fma_(part(tap_weight, 2 * i), lower, sum[2 * i]);
        sum[2 * i + 1] = fma_(part(tap_weight, 2 * i + 1), upper, sum[2 * i + 1]);
    }
}
#endif

// The voxel and the tap, counted from the first of those held at once, of a thread's sample. Neighbouring threads get
// neighbours in either memory layout of the shifts.
__device__ __forceinline__ bool sample_of(int member, int e, bool taps_first, const Convolution& v, const Tile& tile,
                                          int& voxel, int& tap, int& d, int& h, int& w) {
    int i = member + e * GROUP;
    COMPUTE_HERE(i);
    voxel = taps_first ? i / TAPS_AT_ONCE : i % VOXELS;
    tap = taps_first ? i % TAPS_AT_ONCE : i / VOXELS;
    voxel_of(tile, voxel, d, h, w);
    return i < SAMPLES && d < v.D && h < v.H && w < v.W;
}

__device__ __forceinline__ void fetch_shifts(
    const StoredShifts& shifts, const Convolution& v, const Tile& tile, int member, int first_tap,
    float (&ahead)[SAMPLES_EACH][3]
) {
#pragma unroll
    for (int e = 0; e < SAMPLES_EACH; ++e) {
        int voxel, tap, d, h, w;
        ahead[e][0] = 2e9f;  // so far out that it samples nothing
        if (!sample_of(member, e, shifts.stride_c == 1, v, tile, voxel, tap, d, h, w)) continue;
        shifts.read(tile.n, d, h, w, first_tap + tap, ahead[e]);
    }
}

__device__ __forceinline__ void place_cells(
    const StoredShifts& shifts, const Convolution& v, const Tile& tile, int member, int first_tap,
    const float (&ahead)[SAMPLES_EACH][3], Cell* cells, unsigned* places
) {
#pragma unroll
    for (int e = 0; e < SAMPLES_EACH; ++e) {
        if (SAMPLES % GROUP && member + e * GROUP >= SAMPLES) break;
        int voxel, tap, d, h, w;
        const bool exists = sample_of(member, e, shifts.stride_c == 1, v, tile, voxel, tap, d, h, w);
        const float factor = exists ? shifts.factor(tile.n, d, h, w, first_tap + tap) : 0;
        Cell cell;
        const int to = voxel * TAPS_AT_ONCE + tap;
        places[to] = place_cell(v, d, h, w, first_tap + tap, ahead[e], factor, voxel, cell);
        cells[to] = cell;
    }
}

// Whether all are finite: infinity and NaN minus themselves are not zero.
__device__ __forceinline__ bool all_finite(const Real (&sum)[VECTOR]) {
    bool finite = true;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) finite = finite && sum[i] - sum[i] == 0;
    return finite;
}

// The sum of one voxel's taps from the corners inside alone. One corner after another: this is rarely needed and must
// not take registers from the gather.
__device__ __forceinline__ void sum_inside(
    const Convolution& v, const StoredShifts& shifts, const Scalar* origin, const unsigned char* weights,
    int n, int d, int h, int w, Real (&sum)[VECTOR]
) {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) sum[i] = 0;
#pragma unroll 1
    for (int tap = 0; tap < 27; ++tap) {
        COMPUTE_HERE(tap);
        Real shift[3], value[VECTOR] = {};
        Sample s;
        int low_d, low_h, low_w;
        const Real factor = shifts(n, d, h, w, 0, tap, shift);
        const unsigned inside = locate(v, d, h, w, tap, shift[0], shift[1], shift[2], s, low_d, low_h, low_w);
#pragma unroll 1
        for (int k = 0; k < 8; ++k) {
            if (!(inside >> k & 1u)) continue;
            const int voxel = s.base + ((k & 4 ? v.H : 0) + (k & 2 ? 1 : 0)) * v.W + (k & 1);
            const Pack corner = load(moved(origin, (int64)voxel * VOXEL_BYTES));
            const Real weight = (k & 4 ? s.d : 1 - s.d) * (k & 2 ? s.h : 1 - s.h) * (k & 1 ? s.w : 1 - s.w);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) value[i] = fma_(weight, part(corner, i), value[i]);
        }
        const Pack tap_weight = *reinterpret_cast<const Pack*>(weights + tap * VOXEL_BYTES);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) sum[i] = fma_(part(tap_weight, i), value[i] * factor, sum[i]);
    }
}

extern "C" __global__ void __launch_bounds__(768, 1) deform_forward_walk(
    const Scalar* __restrict__ input, const Scalar* __restrict__ offset, const Scalar* __restrict__ weight,
    const Scalar* __restrict__ bias, const Scalar* __restrict__ mask, Scalar* __restrict__ output, int64 depth,
    int64 height, int64 width, int64 offset_n, int64 offset_c, int64 offset_v, int64 mask_n, int64 mask_c,
    int64 mask_v, int64 tiles
) {
    const int D = (int)depth, H = (int)height, W = (int)width;
    const Convolution v = {D, H, W, D, H, W, 27, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    const Steps step(CHANNELS, H, W);
    const StoredShifts shifts = {offset, mask, offset_n, offset_c, offset_v, mask_n, mask_c, mask_v, H, W};
    const int thread = threadIdx.x, group = thread / GROUP, member = thread % GROUP;
    const int slot = member / LANES, c = member % LANES * VECTOR;

    SHARED_MEMORY(shared);
    const Workspace work = workspace_in(shared);
    // From (C, 1, 3, 3, 3) in memory to [tap][channel] in the shared copies.
    for (int i = thread; i < 27 * CHANNELS; i += THREADS) {
        const Scalar value = weight[i % CHANNELS * 27 + i / CHANNELS];
#pragma unroll
        for (int copy = 0; copy < WEIGHT_COPIES; ++copy) {
            reinterpret_cast<Scalar*>(work.weights + copy * COPY_BYTES)[i] = value;
        }
    }
    if (thread == 0) *work.taken = 0;
    __syncthreads();

    Cell* cells = work.cells + group * SAMPLES;
    unsigned* places = work.places + group * SAMPLES;
    const unsigned char* weights = work.weights + slot % WEIGHT_COPIES * COPY_BYTES + c * sizeof(Scalar);
    const int first_tile = (int)(tiles * blockIdx.x / gridDim.x), last_tile = (int)(tiles * (blockIdx.x + 1) / gridDim.x);

    while (true) {
        if (member == 0) work.tile[group] = first_tile + atomicAdd(work.taken, 1);
        GROUP_BARRIER(group + 1, GROUP);  // also: the samples of the previous tile have been read
        const int number = work.tile[group];
        if (number >= last_tile) break;
        const Tile tile = walked_tile(number, D, H, W);
        const Scalar* origin = moved(input, (int64)tile.n * D * step.d) + c;

        Real sum[VECTOR] = {};
        float ahead[SAMPLES_EACH][3];
        fetch_shifts(shifts, v, tile, member, 0, ahead);
#pragma unroll 1
        for (int first_tap = 0; first_tap < 27; first_tap += TAPS_AT_ONCE) {
            if (first_tap) GROUP_BARRIER(group + 1, GROUP);
            place_cells(shifts, v, tile, member, first_tap, ahead, cells, places);
            GROUP_BARRIER(group + 1, GROUP);
            // In flight while this thread gathers.
            if (first_tap + TAPS_AT_ONCE < 27) fetch_shifts(shifts, v, tile, member, first_tap + TAPS_AT_ONCE, ahead);
#pragma unroll (TAPS_UNROLLED)
            for (int tap = 0; tap < TAPS_AT_ONCE; ++tap) {
                const Cell cell = cells[slot * TAPS_AT_ONCE + tap];
                Pack corner[8];
                load_cell(origin, places[slot * TAPS_AT_ONCE + tap], (unsigned)step.h, (unsigned)step.d, corner);
                const Pack tap_weight = *reinterpret_cast<const Pack*>(weights + (first_tap + tap) * VOXEL_BYTES);
                add_tap(cell, corner, tap_weight, sum);
            }
        }

        int voxel = slot, d, h, w;
        COMPUTE_HERE(voxel);
        voxel_of(tile, voxel, d, h, w);
        if (d < D && h < H && w < W) {
            if (!all_finite(sum)) sum_inside(v, shifts, origin, weights, tile.n, d, h, w, sum);
            if (bias) {
                const Pack start = load(bias + c);
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) sum[i] += part(start, i);
            }
            const int64 at = (((int64)tile.n * D + d) * H + h) * W + w;
            store(output + at * CHANNELS + c, sum);
        }
    }
}
