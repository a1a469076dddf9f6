"""The emulator itself: real barriers and shuffles, and the faults that it must detect."""

import os
import subprocess
import sys
from dataclasses import dataclass

import cuda_emulator
import pytest
import torch
from cuda_emulator import FORWARD, REVERSE, SHUFFLED, EmulatedRuntime, KernelError

TOYS = """
typedef long long int64;
#define SHARED_MEMORY(name) unsigned char* name = deform3d_shared_memory()

extern "C" __global__ void add(const float* a, const float* b, float* sum, int64 n) {
    for (int64 i = blockIdx.x * (int64)blockDim.x + threadIdx.x; i < n; i += gridDim.x * (int64)blockDim.x) {
        sum[i] = a[i] + b[i];
    }
}

__device__ int linear() { return threadIdx.x + threadIdx.y * blockDim.x; }

// Every block sums its row; BARRIER 0 omits the barriers that the sum needs.
extern "C" __global__ void __launch_bounds__(1024) sum_rows(const float* values, float* sums, int64 n) {
    SHARED_MEMORY(shared);
    float* partial = reinterpret_cast<float*>(shared);
    const int threads = blockDim.x * blockDim.y;
    partial[linear()] = linear() < n ? values[blockIdx.x * n + linear()] : 0;
    for (int half = threads / 2; half; half /= 2) {
#if BARRIER
        __syncthreads();
#endif
        if (linear() < half) partial[linear()] += partial[linear() + half];
    }
    if (!linear()) sums[blockIdx.x] = partial[0];
}

// Two shuffles in a row without a barrier between them, among `width` neighbours; y counts into the warp.
extern "C" __global__ void __launch_bounds__(128) sum_neighbours(
    const double* values, double* sums, int* lanes, int64 width
) {
    double value = values[linear()];
    int ones = 1;
    for (int lane = 1; lane < width; lane *= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, lane);
        ones += __shfl_xor_sync(0xffffffffu, ones, lane);
    }
    sums[linear()] = value;
    lanes[linear()] = ones;
}

extern "C" __global__ void count(const int* bins, int* counts, int* ranks, int64 n) {
    int64 i = blockIdx.x * (int64)blockDim.x + threadIdx.x;
    if (i < n) ranks[i] = atomicAdd(counts + bins[i], 1);
}

extern "C" __global__ void stop_early(int64 stops, int64 how) {
    if (linear() < stops) return;
    if (how == 0) __syncthreads();
    if (how == 1) __shfl_xor_sync(0xffffffffu, 1, 1);
    if (how == 2) __syncwarp();
}

extern "C" __global__ void two_barriers(int64 threads) {
    if (linear() < threads) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

// Groups of 64 threads, each with its own barrier, take rows in turn and sum them; BARRIER 0 omits the barriers.
extern "C" __global__ void __launch_bounds__(256) sum_rows_in_groups(const float* values, float* sums, int64 rows) {
    SHARED_MEMORY(shared);
    int* taken = reinterpret_cast<int*>(shared);
    const int group = threadIdx.x / 64, member = threadIdx.x % 64;
    float* partial = reinterpret_cast<float*>(shared) + 8 + 64 * group;
    if (threadIdx.x == 0) *taken = 0;
    __syncthreads();
    while (true) {
        if (member == 0) taken[1 + group] = atomicAdd(taken, 1);
        emulated::synchronize_group(1 + group, 64, __LINE__);
        const int row = taken[1 + group];
        if (row >= rows) break;
        partial[member] = values[row * 64 + member];
        for (int half = 32; half; half /= 2) {
#if BARRIER
            emulated::synchronize_group(1 + group, 64, __LINE__);
#endif
            if (member < half) partial[member] += partial[member + half];
        }
        if (member == 0) sums[row] = partial[0];
        emulated::synchronize_group(1 + group, 64, __LINE__);
    }
}

extern "C" __global__ void group_barriers(int64 stops, int64 number, int64 second_warp) {
    if (linear() < stops) return;
    emulated::synchronize_group((int)number, linear() < 32 ? 64 : (int)second_warp, __LINE__);
}

extern "C" __global__ void write_shared(int64 at) {
    SHARED_MEMORY(shared);
    shared[at] = 1;
}

struct __align__(16) Four {
    float values[4];
};
extern "C" __global__ void add_one(int64 value, int64* to) { *to = value + 1; }

extern "C" __global__ void load_four(const Four* from, float* to, int64 at) { *to = from[at].values[0]; }
"""


@dataclass(frozen=True)
class Toy:
    name: str
    unit: str = "toys"
    options: tuple[str, ...] = ("-DBARRIER=1",)


@pytest.fixture(params=[FORWARD, REVERSE, SHUFFLED], ids=["forward", "reverse", "shuffled"])
def runtime(kernel_compiler, request):
    return EmulatedRuntime(kernel_compiler, lambda _unit: TOYS, order=request.param)


def launch(runtime, toy, grid, block, shared_bytes, *args):
    toy = Toy(toy) if isinstance(toy, str) else toy
    values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
    runtime.launch(torch.device("cpu"), toy, grid, block, shared_bytes, values)


def test_every_block_and_thread_runs(runtime):
    a, b = torch.randn(2, 1000)
    total = torch.full((1001,), torch.nan)
    launch(runtime, "add", 3, (64, 1), 0, a, b, total, 1000)
    assert torch.equal(total[:1000], a + b)
    assert total[1000].isnan()
    assert runtime.launches[0].args[3] == 1000


@pytest.mark.parametrize("block", [(64, 1), (8, 32), (1, 1)])
def test_barriers(runtime, block):
    threads = block[0] * block[1]
    values = torch.randn(5, threads)
    sums = torch.empty(5)
    launch(runtime, "sum_rows", 5, block, 4 * threads, values, sums, threads)
    torch.testing.assert_close(sums, values.sum(1))


def test_missing_barrier_is_detected(kernel_compiler):
    """One order of threads or the other shows it, depending on which thread has to wait."""
    values, sums = torch.randn(1, 64), torch.empty(1)
    wrong = 0
    for order in (FORWARD, REVERSE):
        runtime = EmulatedRuntime(kernel_compiler, lambda _unit: TOYS, order=order)
        launch(runtime, Toy("sum_rows", options=("-DBARRIER=0",)), 1, (64, 1), 256, values, sums, 64)
        wrong += not torch.allclose(sums, values.sum(1))
    assert wrong


def test_group_barriers(runtime):
    values = torch.randn(11, 64)
    sums = torch.full((12,), torch.nan)
    launch(runtime, "sum_rows_in_groups", 1, (256, 1), 4 * (8 + 4 * 64), values, sums, 11)
    torch.testing.assert_close(sums[:11], values.sum(1))
    assert sums[11].isnan()


def test_missing_group_barrier_is_detected(kernel_compiler):
    values, sums = torch.randn(11, 64), torch.empty(11)
    wrong = 0
    for order in (FORWARD, REVERSE):
        runtime = EmulatedRuntime(kernel_compiler, lambda _unit: TOYS, order=order)
        toy = Toy("sum_rows_in_groups", options=("-DBARRIER=0",))
        launch(runtime, toy, 1, (256, 1), 4 * (8 + 4 * 64), values, sums, 11)
        wrong += not torch.allclose(sums, values.sum(1))
    assert wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 1, 64), "deadlock.* 60 at barriers of groups"),
        ((0, 16, 64), "barrier 16 of 64 threads in line .*, which no GPU has"),
        ((0, 1, 33), "barrier 1 of 33 threads in line .*, which no GPU has"),
        ((0, 1, 32), "barrier 1 of .* reached while others wait for"),
    ],
)
def test_wrong_group_barriers_are_errors(kernel_compiler, arguments, message):
    runtime = EmulatedRuntime(kernel_compiler, lambda _unit: TOYS)
    with pytest.raises(KernelError, match=message):
        launch(runtime, "group_barriers", 1, (64, 1), 0, *arguments)


@pytest.mark.parametrize("block", [(64, 1), (4, 16), (40, 1)])
@pytest.mark.parametrize("width", [2, 8])
def test_shuffles(runtime, block, width):
    threads = block[0] * block[1]
    values = torch.randn(threads, dtype=torch.float64)
    sums, lanes = torch.empty_like(values), torch.empty(threads, dtype=torch.int32)
    launch(runtime, "sum_neighbours", 1, block, 0, values, sums, lanes, width)
    torch.testing.assert_close(sums, values.view(-1, width).sum(1).repeat_interleave(width))
    assert (lanes == width).all()


def test_shuffle_from_a_missing_lane_is_nan(runtime):
    values = torch.ones(40, dtype=torch.float64)
    sums, lanes = torch.empty_like(values), torch.empty(40, dtype=torch.int32)
    launch(runtime, "sum_neighbours", 1, (40, 1), 0, values, sums, lanes, 32)
    assert (sums[:32] == 32).all()
    assert sums[32:].isnan().all()


def test_atomics(runtime):
    bins = torch.randint(0, 5, (300,), dtype=torch.int32)
    counts, ranks = torch.zeros(5, dtype=torch.int32), torch.empty(300, dtype=torch.int32)
    launch(runtime, "count", 5, (64, 1), 0, bins, counts, ranks, 300)
    assert torch.equal(counts.long(), bins.long().bincount(minlength=5))
    for number in range(5):
        assert torch.equal(ranks[bins == number].sort().values, torch.arange(int(counts[number]), dtype=torch.int32))


@pytest.mark.parametrize(
    ("how", "waits"), [(0, "60 threads wait at"), (1, "28 in a shuffle, 36 returned"), (2, "28 at __syncwarp")]
)
def test_deadlock_is_an_error(runtime, how, waits):
    """Four threads return early; the second of two warps continues if it waits only for itself."""
    with pytest.raises(KernelError, match=f"stop_early: block [01].*deadlock.*{waits}"):
        launch(runtime, "stop_early", 2, (64, 1), 0, 4, how)


def test_barriers_at_two_places_are_an_error(runtime):
    launch(runtime, "two_barriers", 1, (8, 1), 0, 8)
    with pytest.raises(KernelError, match=r"reached while others wait in line"):
        launch(runtime, "two_barriers", 1, (8, 1), 0, 5)


def test_wrong_launches(runtime):
    for grid, block, shared_bytes in ((0, (32, 1), 0), (1, (32, 33), 0), (1, (32, 1), 48 * 1024 + 1)):
        with pytest.raises(KernelError, match="which no GPU launches"):
            launch(runtime, "write_shared", grid, block, shared_bytes, 0)
    with pytest.raises(KernelError, match="expected at most 128 threads"):
        launch(runtime, "sum_neighbours", 1, (160, 1), 0, 0, 0, 0, 1)
    with pytest.raises(KernelError, match="got 2 arguments, its signature has 1"):
        launch(runtime, "write_shared", 1, (1, 1), 1, 0, 0)
    with pytest.raises(KernelError, match="expected integers of 64 bits"):
        launch(runtime, "write_shared", 1, (1, 1), 1, 2**63)
    with pytest.raises(KernelError, match="no_such_kernel"):
        launch(runtime, "no_such_kernel", 1, (1, 1), 1)


# Faults that a GPU may not report, and the sanitizer's messages.
FAULTS = {
    "read past a tensor": (
        "launch(runtime, 'add', 1, (32, 1), 0, torch.ones(25), torch.ones(26), torch.ones(26), 26)",
        "heap-buffer-overflow",
    ),
    "read before a tensor": (
        "launch(runtime, 'load_four', 1, (1, 1), 0, torch.ones(4), torch.ones(1), -1)",
        "heap-buffer-overflow",
    ),
    "write past shared memory": ("launch(runtime, 'write_shared', 1, (1, 1), 25, 25)", "heap-buffer-overflow"),
    "misaligned vector": (
        "launch(runtime, 'load_four', 1, (1, 1), 0, torch.ones(9)[1:], torch.ones(1), 0)",
        "misaligned address",
    ),
    "overflow": (
        "launch(runtime, 'add_one', 1, (1, 1), 0, 2**63 - 1, torch.ones(1).long())",
        "signed integer overflow",
    ),
}
SANITIZED = """
import os, sys, pathlib, torch
sys.path.insert(0, {tests!r})
from test_cuda_emulator import FAULTS, TOYS, launch
from cuda_emulator import Compiler, EmulatedRuntime
folder = pathlib.Path({folder!r})
runtime = EmulatedRuntime(Compiler(folder), lambda _unit: TOYS, order=1)
values, sums = torch.randn(5, 64), torch.empty(5)
assert sums.isnan().all()
launch(runtime, "sum_rows", 5, (8, 8), 256, values, sums, 64)
torch.testing.assert_close(sums, values.sum(1))
for fault, (statement, report) in FAULTS.items():
    text = folder / (fault + ".txt")
    if not (child := os.fork()):
        os.dup2(os.open(text, os.O_WRONLY | os.O_CREAT), 2)
        exec(statement)
        os._exit(0)
    assert os.waitpid(child, 0)[1], fault + ": nothing stopped it"
    assert report in text.read_text(), fault + ": " + text.read_text()
"""


def test_sanitizer_stops_only_faults(kernel_compiler):
    environment = cuda_emulator.sanitizer_environment()
    if environment is None:
        pytest.skip("g++ has no address sanitizer to preload")
    code = SANITIZED.format(tests=os.path.dirname(__file__), folder=str(kernel_compiler.folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert not done.returncode, done.stderr
