"""Times, memory and kernels of work on a GPU."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Work = Callable[[], object]


class Progress:
    """Prints one line per finished step, with the time left at this pace."""

    def __init__(self, steps: int) -> None:
        self.steps, self.done, self.start = steps, 0, time.monotonic()

    def step(self, text: str) -> None:
        self.done = min(self.done + 1, self.steps)
        elapsed = time.monotonic() - self.start
        left = elapsed / self.done * (self.steps - self.done)
        print(f"[{self.done}/{self.steps}, {elapsed:.0f} s, about {left:.0f} s left] {text}", flush=True)


class Stopwatch:
    """Medians of many runs, timed by events on the stream.

    Before each run the L2 cache is overwritten, and a kernel that only waits lets the host queue the whole run first,
    so that only the GPU's work is timed. If a run has more launches than the queue holds, the host's time shows.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        properties = torch.cuda.get_device_properties()
        self.flush = torch.empty(4 * properties.L2_cache_size, dtype=torch.uint8, device="cuda")
        self.clock_hz = boost_clock_hz()

    def milliseconds(self, run: Work) -> float:
        """Return the median over about `seconds`, at least 5 and at most 100 runs, after three to warm up."""
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        queued = time.perf_counter() - start
        torch.cuda.synchronize()
        whole = time.perf_counter() - start
        repeats = int(min(max(self.seconds / whole, 5), 100))
        cycles = int(min(2 * queued, 0.02) * self.clock_hz)
        events = []
        for _ in range(repeats):
            self.flush.zero_()
            torch.cuda._sleep(cycles)
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            run()
            pair[1].record()
            events.append(pair)
        torch.cuda.synchronize()
        return statistics.median(first.elapsed_time(last) for first, last in events)


def boost_clock_hz() -> float:
    """Return the card's highest clock, from its driver."""
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, check=True, capture_output=True, text=True, timeout=30).stdout
        return 1e6 * float(answer.split()[torch.cuda.current_device()])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 1e3 * torch.cuda.get_device_properties().clock_rate


def gather_floor_ms(
    channels: int, size: int, batch: int, itemsize: int, multiprocessors: int, clock_hz: float
) -> float:
    """Return the time for which the L1 caches, at 128 bytes per clock, read 27 taps x 8 corners of every channel."""
    return 1000 * 27 * 8 * channels * batch * size**3 * itemsize / (multiprocessors * 128 * clock_hz)


def peak_bytes(run: Work) -> int:
    """Return the peak memory of a run, its result included, beyond what was allocated before."""
    run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def profiled(run: Work, repeats: int) -> Any:
    """Profile some runs, after one to warm up."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as result:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    return result


def kernel_times(events: Sequence[Any], repeats: int) -> list[dict[str, Any]]:
    """Return the kernels, copies and fills of one run on the GPU, the longest first."""
    calls: dict[str, int] = defaultdict(int)
    times: dict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            calls[event.name] += 1
            times[event.name] += event.self_device_time_total
    rows = [{"kernel": name, "calls": calls[name] / repeats, "us": times[name] / repeats} for name in times]
    return sorted(rows, key=lambda row: -row["us"])


def operator_us(events: Sequence[Any], repeats: int) -> float:
    """Return the GPU time of one run below the operators of `deform3d`; one called by another counts once."""
    total = 0.0
    for event in events:
        if event.device_type == DeviceType.CPU and _ours(event) and not _below_ours(event):
            total += event.device_time_total
    return total / repeats


def _ours(event: Any) -> bool:
    return str(event.name).startswith("deform3d::")


def _below_ours(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if _ours(parent):
            return True
        parent = parent.cpu_parent
    return False
