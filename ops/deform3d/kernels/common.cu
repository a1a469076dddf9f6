// The part that all units share: element types, vector loads, sampling positions, tiles of voxels.
//
// Every unit is this file followed by its own, compiled with these macros:
//   DTYPE   0 float16, 1 bfloat16, 2 float32, 3 float64
//   VECTOR  channels that a thread loads at once: 1, 2, 4 or 8, at most 16 bytes
//   CUBE    1: kernel 3x3x3, stride 1, padding 1, dilation 1, known to the compiler; 0: all sizes are arguments
// No CUDA header is included, so that NVRTC alone compiles this. Every kernel argument is a 64-bit integer or a
// pointer; a pointer that does not apply is null. Volumes are channels-last: element (n, d, h, w, c) is at
// (((n * D + d) * H + h) * W + w) * C + c. Voxel numbers within one sample fit 32 bits; element numbers need 64.

typedef long long int64;

#ifdef DEFORM3D_EMULATED
#define SHARED_MEMORY(name) unsigned char* name = deform3d_shared_memory()
#else
#define SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#endif

// ---------------------------------------------------------------------------------------------- element types

#if DTYPE == 3
typedef double Scalar;
typedef double Real;
#elif DTYPE == 2
typedef float Scalar;
typedef float Real;
#else
struct Scalar {
    unsigned short bits;
};
typedef float Real;
#endif

#ifdef DEFORM3D_EMULATED
__device__ __forceinline__ float float_from_bits(unsigned bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}
__device__ __forceinline__ unsigned bits_from_float(float value) {
    unsigned bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}
__device__ __forceinline__ float half_to_float(unsigned short bits) {
    _Float16 half;
    __builtin_memcpy(&half, &bits, sizeof half);
    return half;
}
__device__ __forceinline__ unsigned short float_to_half(float value) {
    _Float16 half = (_Float16)value;
    unsigned short bits;
    __builtin_memcpy(&bits, &half, sizeof bits);
    return bits;
}
#else
__device__ __forceinline__ float float_from_bits(unsigned bits) { return __uint_as_float(bits); }
__device__ __forceinline__ unsigned bits_from_float(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float half_to_float(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ __forceinline__ unsigned short float_to_half(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

#if DTYPE == 0
__device__ __forceinline__ Real real_from_bits(unsigned short bits) { return half_to_float(bits); }
__device__ __forceinline__ unsigned short bits_from_real(Real value) { return float_to_half(value); }
#elif DTYPE == 1
__device__ __forceinline__ Real real_from_bits(unsigned short bits) { return float_from_bits((unsigned)bits << 16); }
__device__ __forceinline__ unsigned short bits_from_real(Real value) {
    // Round to nearest, ties to even; in integers, because sm_75 has no instruction for it.
    unsigned bits = bits_from_float(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (unsigned short)(bits >> 16 | 0x40u);  // NaN stays NaN
    return (unsigned short)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
#endif

#if DTYPE >= 2
__device__ __forceinline__ Real to_real(Scalar value) { return value; }
__device__ __forceinline__ Scalar to_scalar(Real value) { return value; }
#else
__device__ __forceinline__ Real to_real(Scalar value) { return real_from_bits(value.bits); }
__device__ __forceinline__ Scalar to_scalar(Real value) {
    Scalar result;
    result.bits = bits_from_real(value);
    return result;
}
#endif

// ----------------------------------------------------------------------------------------------- vector loads

// VECTOR neighbouring channels of a voxel in memory order: one load instruction.
#if DTYPE >= 2 || VECTOR == 1
struct __align__(sizeof(Scalar) * VECTOR) Pack {
    Scalar element[VECTOR];
};
__device__ __forceinline__ Real part(const Pack& pack, int i) { return to_real(pack.element[i]); }
__device__ __forceinline__ Pack packed(const Real (&values)[VECTOR]) {
    Pack pack;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) pack.element[i] = to_scalar(values[i]);
    return pack;
}
#else
struct __align__(sizeof(Scalar) * VECTOR) Pack {
    unsigned pair[VECTOR / 2];
};
__device__ __forceinline__ Real part(const Pack& pack, int i) {
    unsigned pair = pack.pair[i / 2];
#if DTYPE == 1
    // The upper half of a pair is already a float32, except for its lowest bits.
    return float_from_bits(i % 2 ? pair & 0xffff0000u : pair << 16);
#else
    return real_from_bits((unsigned short)(i % 2 ? pair >> 16 : pair & 0xffffu));
#endif
}
__device__ __forceinline__ Pack packed(const Real (&values)[VECTOR]) {
    Pack pack;
#pragma unroll
    for (int i = 0; i < VECTOR / 2; ++i) {
        pack.pair[i] = bits_from_real(values[2 * i]) | (unsigned)bits_from_real(values[2 * i + 1]) << 16;
    }
    return pack;
}
#endif

__device__ __forceinline__ Pack load(const Scalar* from) { return *reinterpret_cast<const Pack*>(from); }
__device__ __forceinline__ void store(Scalar* to, const Real (&values)[VECTOR]) {
    *reinterpret_cast<Pack*>(to) = packed(values);
}
__device__ __forceinline__ Pack nothing() {
    Real zeros[VECTOR] = {};
    return packed(zeros);
}

// ----------------------------------------------------------------------------------------- sampling positions

__device__ __forceinline__ float floor_(float x) { return floorf(x); }
__device__ __forceinline__ double floor_(double x) { return floor(x); }
__device__ __forceinline__ float fma_(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fma_(double a, double b, double c) { return fma(a, b, c); }

// The position that one tap samples: the distances (0 to 1) from the lower voxel along each axis, and the number of that
// voxel within its sample. Coordinates can be -1: the number is then meaningless, but correct with a corner added.
struct __align__(16) Sample {
    Real d, h, w;
    int base;
};

// One axis: false if the position is not finite, or a voxel or more outside. Takes the floor of the shift, not of the
// position, so that no digit of the shift is lost far from the origin.
__device__ __forceinline__ bool place(Real shift, int centre, int size, Real& fraction, int& low) {
    Real whole = floor_(shift);
    fraction = shift - whole;
    if (!(whole > Real(-1e9) && whole < Real(1e9))) return false;
    low = centre + (int)whole;
    return low >= -1 && low < size;
}

// The corners of a cell that lie inside the volume, as bits: corner 4 * d + 2 * h + w.
__device__ __forceinline__ unsigned corners_inside(int low_d, int low_h, int low_w, int D, int H, int W) {
    unsigned along_d = (low_d >= 0 ? 0x0fu : 0u) | (low_d + 1 < D ? 0xf0u : 0u);
    unsigned along_h = (low_h >= 0 ? 0x33u : 0u) | (low_h + 1 < H ? 0xccu : 0u);
    unsigned along_w = (low_w >= 0 ? 0x55u : 0u) | (low_w + 1 < W ? 0xaau : 0u);
    return along_d & along_h & along_w;
}

// The eight trilinear weights, in the order of the corners' bits.
__device__ __forceinline__ void corner_weights(const Sample& s, Real (&weight)[8]) {
    Real h0 = 1 - s.h, d0 = 1 - s.d, w0 = 1 - s.w;
    Real h0w0 = h0 * w0, h0w1 = h0 * s.w, h1w0 = s.h * w0, h1w1 = s.h * s.w;
    weight[0] = d0 * h0w0;
    weight[1] = d0 * h0w1;
    weight[2] = d0 * h1w0;
    weight[3] = d0 * h1w1;
    weight[4] = s.d * h0w0;
    weight[5] = s.d * h0w1;
    weight[6] = s.d * h1w0;
    weight[7] = s.d * h1w1;
}

// The derivatives of the trilinear sample by the position along d, h and w, from the values at the corners.
__device__ __forceinline__ void slopes_of(const Real (&value)[8], const Sample& s, Real (&slope)[3]) {
    Real d0 = 1 - s.d, h0 = 1 - s.h, w0 = 1 - s.w;
    slope[0] = h0 * (w0 * (value[4] - value[0]) + s.w * (value[5] - value[1])) +
               s.h * (w0 * (value[6] - value[2]) + s.w * (value[7] - value[3]));
    slope[1] = d0 * (w0 * (value[2] - value[0]) + s.w * (value[3] - value[1])) +
               s.d * (w0 * (value[6] - value[4]) + s.w * (value[7] - value[5]));
    slope[2] = d0 * (h0 * (value[1] - value[0]) + s.h * (value[3] - value[2])) +
               s.d * (h0 * (value[5] - value[4]) + s.h * (value[7] - value[6]));
}

// The distances between the voxels of a volume in memory, in bytes. The channels of one voxel fit 32 bits, so that the
// address of a voxel takes one multiplication.
struct Steps {
    int64 d, h;
    int w;

    __device__ __forceinline__ Steps(int64 C, int H, int W) {
        w = (int)(C * (int64)sizeof(Scalar));
        h = (int64)w * W;
        d = h * H;
    }
};

__device__ __forceinline__ const Scalar* moved(const Scalar* from, int64 bytes) {
    return reinterpret_cast<const Scalar*>(reinterpret_cast<const char*>(from) + bytes);
}

// The channels of the eight corners. Corners outside are not read: zero times their value could be NaN.
__device__ __forceinline__ void load_corners(
    const Scalar* origin, int base, unsigned inside, const Steps& step, Pack (&corner)[8]
) {
    const Scalar* lowest = moved(origin, (int64)base * step.w);
    if (inside == 0xffu) {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const Scalar* plane = k & 4 ? moved(lowest, step.d) : lowest;
            const Scalar* row = k & 2 ? moved(plane, step.h) : plane;
            corner[k] = load(k & 1 ? moved(row, step.w) : row);
        }
    } else {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            corner[k] = nothing();
            if (inside >> k & 1u) {
                corner[k] = load(moved(lowest, (k & 4 ? step.d : 0) + (k & 2 ? step.h : 0) + (k & 1 ? step.w : 0)));
            }
        }
    }
}

// ----------------------------------------------------------------------------------------------- convolutions

// The sizes of the convolution as the launcher passes them, and values derived from them.
struct Convolution {
    int D, H, W, out_D, out_H, out_W, taps, k_h, k_w;
    int stride_d, stride_h, stride_w, padding_d, padding_h, padding_w, dilation_d, dilation_h, dilation_w;
};

#define CONVOLUTION_ARGUMENTS                                                                                         \
    int64 D, int64 H, int64 W, int64 out_D, int64 out_H, int64 out_W, int64 k_d, int64 k_h, int64 k_w,                \
        int64 stride_d, int64 stride_h, int64 stride_w, int64 padding_d, int64 padding_h, int64 padding_w,            \
        int64 dilation_d, int64 dilation_h, int64 dilation_w

#if CUBE
#define CONVOLUTION                                                                                                   \
    { (int)D, (int)H, (int)W, (int)out_D, (int)out_H, (int)out_W, 27, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1 }
#else
#define CONVOLUTION                                                                                                   \
    {                                                                                                                 \
        (int)D, (int)H, (int)W, (int)out_D, (int)out_H, (int)out_W, (int)(k_d * k_h * k_w), (int)k_h, (int)k_w,       \
            (int)stride_d, (int)stride_h, (int)stride_w, (int)padding_d, (int)padding_h, (int)padding_w,              \
            (int)dilation_d, (int)dilation_h, (int)dilation_w                                                         \
    }
#endif

// The position that tap `tap` of output voxel (d, h, w) samples after a shift; returns the corners inside the volume.
__device__ __forceinline__ unsigned locate(
    const Convolution& v, int d, int h, int w, int tap, Real shift_d, Real shift_h, Real shift_w, Sample& s,
    int& low_d, int& low_h, int& low_w
) {
    int tap_d = tap / (v.k_h * v.k_w), tap_h = tap / v.k_w % v.k_h, tap_w = tap % v.k_w;
    s.base = 0;
    low_d = low_h = low_w = 0;
    bool near = place(shift_d, d * v.stride_d - v.padding_d + tap_d * v.dilation_d, v.D, s.d, low_d);
    near = place(shift_h, h * v.stride_h - v.padding_h + tap_h * v.dilation_h, v.H, s.h, low_h) && near;
    near = place(shift_w, w * v.stride_w - v.padding_w + tap_w * v.dilation_w, v.W, s.w, low_w) && near;
    if (!near) {
        s.d = s.h = s.w = 0;
        return 0;
    }
    s.base = (low_d * v.H + low_h) * v.W + low_w;
    return corners_inside(low_d, low_h, low_w, v.D, v.H, v.W);
}

// ------------------------------------------------------------------------------------------------------ tiles

// A box of output (or input) voxels of one sample that a block processes together, so that the voxels that its samples
// read stay in the L1 cache. The sides are powers of two, given by their logarithms.
struct Tile {
    int n, d, h, w;
    int log_h, log_w;
};

__device__ __forceinline__ Tile tile_at(
    int64 number, int size_D, int size_H, int size_W, int log_d, int log_h, int log_w
) {
    int along_w = (size_W + (1 << log_w) - 1) >> log_w;
    int along_h = (size_H + (1 << log_h) - 1) >> log_h;
    int along_d = (size_D + (1 << log_d) - 1) >> log_d;
    Tile tile;
    tile.log_h = log_h;
    tile.log_w = log_w;
    tile.w = (int)(number % along_w) << log_w;
    number /= along_w;
    tile.h = (int)(number % along_h) << log_h;
    number /= along_h;
    tile.d = (int)(number % along_d) << log_d;
    tile.n = (int)(number / along_d);
    return tile;
}

__device__ __forceinline__ void voxel_of(const Tile& tile, int i, int& d, int& h, int& w) {
    w = tile.w + (i & ((1 << tile.log_w) - 1));
    h = tile.h + (i >> tile.log_w & ((1 << tile.log_h) - 1));
    d = tile.d + (i >> (tile.log_w + tile.log_h));
}

// The samples of a block's voxels for `count` taps from `first` on, computed once by all threads together and shared by
// all channels. `Shifts` returns the three shifts and the factor (mask) of a voxel and tap.
struct Samples {
    Sample* at;              // [voxel][tap - first]
    Real* factor;            // the same, null without a mask
    unsigned char* inside;   // the same: bits of corners
};

template <class Shifts>
__device__ __forceinline__ void compute_samples(
    const Samples& samples, const Convolution& v, const Tile& tile, int voxels, int first, int count, int stride,
    bool taps_first, const Shifts& shifts
) {
    int thread = threadIdx.x + threadIdx.y * blockDim.x, threads = blockDim.x * blockDim.y;
    for (int i = thread; i < voxels * count; i += threads) {
        // Neighbouring threads read neighbouring shifts in either memory layout.
        int voxel = taps_first ? i / count : i % voxels;
        int tap = taps_first ? i % count : i / voxels;
        int d, h, w;
        voxel_of(tile, voxel, d, h, w);
        Sample s = {};
        unsigned inside = 0;
        int slot = voxel * stride + tap;
        if (d < v.out_D && h < v.out_H && w < v.out_W) {
            int low_d, low_h, low_w;
            Real shift[3];
            Real factor = shifts(tile.n, d, h, w, voxel, first + tap, shift);
            inside = locate(v, d, h, w, first + tap, shift[0], shift[1], shift[2], s, low_d, low_h, low_w);
            if (samples.factor) samples.factor[slot] = factor;
        }
        samples.at[slot] = s;
        samples.inside[slot] = (unsigned char)inside;
    }
}

// Shifts and factors in memory: element (n, channel, voxel) is at n * stride_n + channel * stride_c + voxel * stride_v,
// which covers contiguous and channels-last tensors.
struct StoredShifts {
    const Scalar* offset;
    const Scalar* mask;
    int64 stride_n, stride_c, stride_v, mask_n, mask_c, mask_v;
    int out_H, out_W;

    __device__ __forceinline__ void read(int n, int d, int h, int w, int tap, Real (&shift)[3]) const {
        int64 voxel = ((int64)d * out_H + h) * out_W + w;
        const Scalar* at = offset + n * stride_n + voxel * stride_v + 3 * tap * stride_c;
#pragma unroll
        for (int axis = 0; axis < 3; ++axis) shift[axis] = to_real(at[axis * stride_c]);
    }

    __device__ __forceinline__ Real factor(int n, int d, int h, int w, int tap) const {
        int64 voxel = ((int64)d * out_H + h) * out_W + w;
        return mask ? to_real(mask[n * mask_n + voxel * mask_v + tap * mask_c]) : Real(1);
    }

    __device__ __forceinline__ Real operator()(int n, int d, int h, int w, int, int tap, Real (&shift)[3]) const {
        read(n, d, h, w, tap, shift);
        return factor(n, d, h, w, tap);
    }
};

// The layout of a block's shared memory; the launcher requests the same amount.
__device__ __forceinline__ Samples samples_in(unsigned char* shared, int slots, bool with_factor, unsigned char*& rest) {
    Samples samples;
    samples.at = reinterpret_cast<Sample*>(shared);
    rest = shared + slots * sizeof(Sample);
    samples.factor = with_factor ? reinterpret_cast<Real*>(rest) : nullptr;
    if (with_factor) rest += slots * sizeof(Real);
    samples.inside = rest;
    rest += (slots + 15) / 16 * 16;
    return samples;
}
