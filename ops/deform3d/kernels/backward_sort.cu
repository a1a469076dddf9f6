// The samples of a depthwise 3x3x3 convolution, one offset group, sorted by the cell of the volume that they fall into.
//
// As in backward_input.cu, but a sorted sample is only its id, 4 bytes instead of 16: the gather finds everything else
// by the id.
//
//   deform_cell_keys    names each sample's cell, for a stable sort by PyTorch; or, with `counts`, counts the samples of
//                       each cell and keeps each sample's cell (`deform_backward_taps` can do so too)
//   deform_cell_starts  gives each row of cells a range of the sorted ids; the order of the rows is arbitrary
//   deform_cell_place   writes each sample's id into the range of its cell, in arbitrary order
//
// A row of cells along w has W + 2 numbers. The last one has no samples: its start is the end of the row. A sample's id
// is voxel * taps + tap. Keys are in the order of ids, `sample_cells` in the order [tap][voxel], -1 outside.

extern "C" __global__ void __launch_bounds__(256) deform_cell_keys(
    const Scalar* __restrict__ offset, int* __restrict__ counts, int* __restrict__ sample_cells, int* __restrict__ keys,
    CONVOLUTION_ARGUMENTS, int64 offset_n, int64 offset_c, int64 offset_v, int64 voxels, int64 cells
) {
    const Convolution v = CONVOLUTION;
    const StoredShifts shifts = {offset, nullptr, offset_n, offset_c, offset_v, 0, 0, 0, v.out_H, v.out_W};
    const int within = v.out_D * v.out_H * v.out_W, all = (int)voxels;
    const int64 items = voxels * v.taps;
    for (int64 item = blockIdx.x * (int64)blockDim.x + threadIdx.x; item < items; item += gridDim.x * (int64)blockDim.x) {
        // Neighbouring threads read neighbouring shifts.
        const int voxel = (int)(offset_c == 1 ? item / v.taps : item % all);
        const int tap = (int)(offset_c == 1 ? item % v.taps : item / all);
        const int n = voxel / within, rest = voxel % within;
        const int w = rest % v.out_W, h = rest / v.out_W % v.out_H, d = rest / v.out_W / v.out_H;
        Real shift[3];
        shifts(n, d, h, w, 0, tap, shift);
        Sample s;
        int low_d, low_h, low_w, cell = -1;
        if (locate(v, d, h, w, tap, shift[0], shift[1], shift[2], s, low_d, low_h, low_w)) {
            cell = ((n * (v.D + 1) + low_d + 1) * (v.H + 1) + low_h + 1) * (v.W + 2) + low_w + 1;
        }
        if (keys) {
            keys[(int64)voxel * v.taps + tap] = cell < 0 ? (int)cells : cell;
        } else {
            sample_cells[(int64)tap * all + voxel] = cell;
            if (cell >= 0) atomicAdd(counts + cell, 1);
        }
    }
}

// One warp per row. counts[rows * numbers] is the number of ids assigned so far. Entry i + 1 of a row's starts is the
// start of cell i, until `deform_cell_place` has moved it to the end of that cell, where the next one starts.
extern "C" __global__ void __launch_bounds__(256) deform_cell_starts(
    int* __restrict__ counts, int* __restrict__ starts, int64 rows, int64 numbers
) {
    const int cells = (int)numbers - 1, each = (cells + 31) / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
    for (int64 row = blockIdx.x * (int64)warps + threadIdx.x / 32; row < rows; row += gridDim.x * (int64)warps) {
        const int first = lane * each, end = first + each < cells ? first + each : cells;
        const int* own = counts + row * numbers;
        int* own_starts = starts + row * numbers;
        int sum = 0;
        for (int i = first; i < end; ++i) sum += own[i];
        int before = 0, total = sum;
#pragma unroll
        for (int other = 1; other < 32; other *= 2) {
            const int theirs = __shfl_xor_sync(0xffffffffu, total, other);
            before += lane & other ? theirs : 0;
            total += theirs;
        }
        int base = lane == 0 ? atomicAdd(counts + rows * numbers, total) : 0;
#pragma unroll
        for (int other = 1; other < 32; other *= 2) base |= __shfl_xor_sync(0xffffffffu, base, other);
        int at = base + before;
        if (lane == 0) own_starts[0] = base;
        for (int i = first; i < end; ++i) {
            own_starts[i + 1] = at;
            at += own[i];
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) deform_cell_place(
    const int* __restrict__ sample_cells, int* __restrict__ starts, int* __restrict__ ids, int64 voxels, int64 taps
) {
    const unsigned all = (unsigned)voxels, items = all * (unsigned)taps;
    for (int64 item = blockIdx.x * (int64)blockDim.x + threadIdx.x; item < items; item += gridDim.x * (int64)blockDim.x) {
        const int cell = sample_cells[item];
        const unsigned tap = (unsigned)item / all, voxel = (unsigned)item - tap * all;
        if (cell >= 0) ids[atomicAdd(starts + cell + 1, 1)] = (int)(voxel * (unsigned)taps + tap);
    }
}
