// The gradients of weight and bias from the rows [tile][tap][C] of `partial`; the row of the bias follows the taps.
// A block takes 8 columns, and 32 threads divide the tiles among themselves.
extern "C" __global__ void __launch_bounds__(256) deform_sum_rows(
    const Real* __restrict__ partial, Scalar* __restrict__ grad_weight, Scalar* __restrict__ grad_bias, int64 tiles,
    int64 taps, int64 channels
) {
    SHARED_MEMORY(shared);
    Real* sums = reinterpret_cast<Real*>(shared);  // [slice][column]
    const int columns = (int)((taps + (grad_bias ? 1 : 0)) * channels);
    for (int first = blockIdx.x * 8; first < columns; first += gridDim.x * 8) {
        const int column = first + threadIdx.x;
        Real sum = 0;
        if (column < columns) {
#pragma unroll 4
            for (int64 tile = threadIdx.y; tile < tiles; tile += 32) sum += partial[tile * columns + column];
        }
        __syncthreads();  // the sums of the previous columns have been read
        sums[threadIdx.y * 8 + threadIdx.x] = sum;
        __syncthreads();
        if (threadIdx.y || column >= columns) continue;
#pragma unroll
        for (int slice = 1; slice < 32; ++slice) sum += sums[slice * 8 + threadIdx.x];
        const int tap = column / (int)channels, c = column % (int)channels;
        if (tap < taps) {
            grad_weight[c * taps + tap] = to_scalar(sum);
        } else {
            grad_bias[c] = to_scalar(sum);
        }
    }
}
