// Dense and grouped convolution, any number of offset groups: the samples are written out as rows of a matrix for the
// matrix product of the convolution, and the gradients of those rows come back from another one.
//
// Row (voxel * groups + group) * taps + tap of `columns` holds the channels of that offset group; voxels are counted
// from `first_voxel`, the first output voxel of the launch.

struct Row {
    int64 voxel, n, at;  // number in the launch; sample; number within the sample
    int group, tap;
    unsigned inside;
    Sample s;
    Real factor;
};

__device__ __forceinline__ Row row_at(
    int64 id, const Convolution& v, const StoredShifts& shifts, int64 first_voxel, int groups
) {
    Row row;
    row.tap = (int)(id % v.taps);
    row.group = (int)(id / v.taps % groups);
    row.voxel = id / v.taps / groups;
    const int64 within = (int64)v.out_D * v.out_H * v.out_W;
    row.n = (first_voxel + row.voxel) / within;
    row.at = (first_voxel + row.voxel) % within;
    const int rest = (int)row.at, w = rest % v.out_W, h = rest / v.out_W % v.out_H, d = rest / v.out_W / v.out_H;
    Real shift[3];
    int low_d, low_h, low_w;
    row.factor = shifts((int)row.n, d, h, w, 0, row.group * v.taps + row.tap, shift);
    row.inside = locate(v, d, h, w, row.tap, shift[0], shift[1], shift[2], row.s, low_d, low_h, low_w);
    return row;
}

#define COLUMN_ARGUMENTS                                                                                              \
    const Scalar *__restrict__ input, const Scalar *__restrict__ offset, const Scalar *__restrict__ mask,             \
        CONVOLUTION_ARGUMENTS, int64 channels, int64 offset_n, int64 offset_c, int64 offset_v, int64 mask_n,          \
        int64 mask_c, int64 mask_v, int64 first_voxel, int64 voxels, int64 groups

extern "C" __global__ void __launch_bounds__(256)
    deform_columns(COLUMN_ARGUMENTS, Scalar* __restrict__ columns) {
    const Convolution v = CONVOLUTION;
    const StoredShifts shifts = {offset, mask, offset_n, offset_c, offset_v, mask_n, mask_c, mask_v, v.out_H, v.out_W};
    const Steps step(channels, v.H, v.W);
    const int per_group = (int)(channels / groups), chunks = per_group / VECTOR;
    const int64 items = voxels * groups * v.taps * chunks;
    for (int64 item = blockIdx.x * (int64)blockDim.x + threadIdx.x; item < items; item += gridDim.x * (int64)blockDim.x) {
        const int64 id = item / chunks;
        const int c = (int)(item % chunks) * VECTOR;
        const Row row = row_at(id, v, shifts, first_voxel, (int)groups);
        Real value[VECTOR] = {};
        if (row.inside) {
            Pack corner[8];
            const Scalar* origin = moved(input, row.n * v.D * step.d) + row.group * per_group + c;
            load_corners(origin, row.s.base, row.inside, step, corner);
            Real trilinear[8];
            corner_weights(row.s, trilinear);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
#pragma unroll
                for (int k = 0; k < 8; ++k) value[i] = fma_(trilinear[k], part(corner[k], i), value[i]);
                value[i] *= row.factor;
            }
        }
        store(columns + id * per_group + c, value);
    }
}

// The gradients of offset and mask from those of the columns: a warp takes one row, and its lanes divide the channels.
extern "C" __global__ void __launch_bounds__(256) deform_columns_backward(
    COLUMN_ARGUMENTS, const Scalar* __restrict__ columns, Scalar* __restrict__ grad_offset,
    Scalar* __restrict__ grad_mask
) {
    const Convolution v = CONVOLUTION;
    const StoredShifts shifts = {offset, mask, offset_n, offset_c, offset_v, mask_n, mask_c, mask_v, v.out_H, v.out_W};
    const Steps step(channels, v.H, v.W);
    const int per_group = (int)(channels / groups), lane = threadIdx.x % 32;
    const int64 ids = voxels * groups * v.taps, warps = gridDim.x * (int64)(blockDim.x / 32);
    for (int64 id = blockIdx.x * (int64)(blockDim.x / 32) + threadIdx.x / 32; id < ids; id += warps) {
        const Row row = row_at(id, v, shifts, first_voxel, (int)groups);
        Real dot[8] = {};
        for (int c = lane * VECTOR; row.inside && c < per_group; c += 32 * VECTOR) {
            Pack corner[8];
            const Scalar* origin = moved(input, row.n * v.D * step.d) + row.group * per_group + c;
            load_corners(origin, row.s.base, row.inside, step, corner);
            const Pack towards = load(columns + id * per_group + c);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
#pragma unroll
                for (int k = 0; k < 8; ++k) dot[k] = fma_(part(towards, i), part(corner[k], i), dot[k]);
            }
        }
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            for (int other = 1; other < 32; other *= 2) dot[k] += __shfl_xor_sync(0xffffffffu, dot[k], other);
        }
        if (lane) continue;
        const Sample s = row.s;
        Real slope[3], trilinear[8], product = 0;
        slopes_of(dot, s, slope);
        corner_weights(s, trilinear);
#pragma unroll
        for (int k = 0; k < 8; ++k) product = fma_(trilinear[k], dot[k], product);
        if (grad_offset) {
            Scalar* to =
                grad_offset + row.n * offset_n + row.at * offset_v + 3 * (row.group * v.taps + row.tap) * offset_c;
#pragma unroll
            for (int axis = 0; axis < 3; ++axis) to[axis * offset_c] = to_scalar(row.factor * slope[axis]);
        }
        if (grad_mask) {
            grad_mask[row.n * mask_n + row.at * mask_v + (row.group * v.taps + row.tap) * mask_c] = to_scalar(product);
        }
    }
}
