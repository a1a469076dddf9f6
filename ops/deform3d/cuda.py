"""The CUDA backend: compiles the kernels with CuPy and starts them on PyTorch's current stream.

CuPy may be missing, broken (another CUDA version, no driver) or installed twice. Nothing here imports it before a CUDA
tensor arrives, and `can_run_cuda` says in one sentence what is wrong and what to install.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import struct
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import Geometry
from ._launch import Kernel, Tuning, can_fuse_offset, source
from ._launch import backward as _backward
from ._launch import forward as _forward
from ._launch import forward_fused_offset as _forward_fused_offset
from ._launch.plan import DTYPE_CODES
from .reference import Gradients

__all__ = [
    "CupyRuntime",
    "backward",
    "can_fuse_offset",
    "can_run_cuda",
    "forward",
    "forward_fused_offset",
    "runtime",
]

log = logging.getLogger("deform3d")

_OLDEST_CAPABILITY = (7, 5)
# More than any kernel takes.
_MAX_ARGUMENTS = 64


class CupyRuntime:
    """Compiles each kernel once per device and keeps it.

    Args:
        tuning: sizes of blocks and chunks.
    """

    def __init__(self, tuning: Tuning | None = None) -> None:
        self.tuning = tuning or Tuning()
        self._functions: dict[tuple[int, Kernel], Any] = {}
        self._started = _Started()
        self._lock = threading.Lock()

    def launch(
        self,
        device: torch.device,
        kernel: Kernel,
        grid: int,
        block: tuple[int, int],
        shared_bytes: int,
        args: Sequence[int],
    ) -> None:
        """Start `grid` blocks on the device's current stream; each argument is a 64-bit integer or an address."""
        current = torch.cuda.current_device()
        index = current if device.index is None else device.index
        if index == current:
            self._launch(index, kernel, grid, block, shared_bytes, args)
        else:
            with torch.cuda.device(index):
                self._launch(index, kernel, grid, block, shared_bytes, args)

    def _launch(
        self, index: int, kernel: Kernel, grid: int, block: tuple[int, int], shared_bytes: int, args: Sequence[int]
    ) -> None:
        """Start a kernel on the current device, `index`."""
        function, started = self._functions.get((index, kernel)), self._started
        if function is None or index not in started.devices:
            self._launch_first(index, kernel, grid, block, shared_bytes, args)
            return
        # CuPy's own call makes three objects per argument; the driver reads this array and keeps a copy.
        struct.pack_into(f"{len(args)}q", started.arguments, 0, *args)
        # Looked up at every launch: on any stream but PyTorch's, a CUDA graph would stay empty without an error.
        stream = torch._C._cuda_getCurrentRawStream(index)
        started.start(function.ptr, grid, 1, 1, *block, 1, shared_bytes, stream, started.addresses_at, 0)

    def _launch_first(
        self, index: int, kernel: Kernel, grid: int, block: tuple[int, int], shared_bytes: int, args: Sequence[int]
    ) -> None:
        """Start a kernel not yet compiled, or this thread's first, for which CuPy prepares the device's context."""
        import cupy

        # CuPy and PyTorch share the driver's current device, but CuPy compiles for the device that it set itself.
        with cupy.cuda.Device(index), _external_stream(torch.cuda.current_stream(index).cuda_stream):
            function = self._functions.get((index, kernel)) or self._compile(index, kernel)
            function((grid,), block, tuple(args), shared_mem=shared_bytes)
        self._started.devices.add(index)

    def multiprocessors(self, device: torch.device) -> int:
        """Return the number of multiprocessors of the device."""
        return _multiprocessors(torch.cuda.current_device() if device.index is None else device.index)

    def _compile(self, index: int, kernel: Kernel) -> Any:
        import cupy

        with self._lock:
            if (index, kernel) not in self._functions:
                module = cupy.RawModule(code=source(kernel.unit), options=("-std=c++17", *kernel.options))
                # A function of the current device; it keeps its module loaded.
                self._functions[index, kernel] = module.get_function(kernel.name).kernel
                log.debug("compiled %s %s for cuda:%d", kernel.name, " ".join(kernel.options), index)
            return self._functions[index, kernel]


class _Started(threading.local):
    """Launch state of one thread: its initialised devices, and the array of addresses that the driver reads."""

    def __init__(self) -> None:
        import cupy

        self.devices: set[int] = set()
        self.arguments = (ctypes.c_int64 * _MAX_ARGUMENTS)()
        first, size = ctypes.addressof(self.arguments), ctypes.sizeof(ctypes.c_int64)
        self.addresses = (ctypes.c_void_p * _MAX_ARGUMENTS)(*(first + size * i for i in range(_MAX_ARGUMENTS)))
        self.addresses_at = ctypes.addressof(self.addresses)
        self.start = cupy.cuda.driver.launchKernel


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def _external_stream(pointer: int) -> Any:
    """Return PyTorch's stream as a context manager of CuPy; CuPy 14 renamed the constructor."""
    import cupy

    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_ForeignStream(pointer))
    return cupy.cuda.ExternalStream(pointer)


class _ForeignStream:
    """A stream in the form of the CUDA stream protocol."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


@functools.cache
def runtime() -> CupyRuntime:
    """Return the runtime of this process."""
    return CupyRuntime()


def can_run_cuda(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Return whether the CUDA kernels can run tensors of this device and dtype, and why or why not."""
    if device.type != "cuda":
        return False, f"the CUDA backend needs CUDA tensors, got {device}"
    if dtype not in DTYPE_CODES:
        return False, f"the CUDA backend has no kernel for {dtype}"
    problem = _cupy_problem()
    return not problem, problem or "CUDA tensors, and CuPy works"


@functools.cache
def _cupy_problem() -> str:
    """Return why the kernels cannot run and what to install, or an empty text; CuPy may be installed but broken."""
    install = f"install it with `pip install {_cupy_package()}`"
    try:
        import cupy
    except Exception as error:  # a broken CuPy fails in many ways: no CUDA library, wrong NumPy, two versions at once
        return f"CuPy cannot be loaded ({type(error).__name__}: {error}); {install}"
    try:
        if not cupy.cuda.runtime.getDeviceCount():
            return "CuPy finds no GPU; check the NVIDIA driver and CUDA_VISIBLE_DEVICES"
        capability = torch.cuda.get_device_capability()
        if capability < _OLDEST_CAPABILITY:
            return f"the GPU has compute capability {capability}, the kernels need {_OLDEST_CAPABILITY} or later"
        probe = cupy.RawModule(code='extern "C" __global__ void probe() {}').get_function("probe")
        probe((1,), (1,), ())
    except Exception as error:  # no driver, a driver older than CuPy's CUDA, no NVRTC, no folder for its cache
        return f"CuPy cannot run a kernel ({type(error).__name__}: {error}); update the NVIDIA driver, or {install}"
    return ""


def _cupy_package() -> str:
    """Return the name of the CuPy wheel for the CUDA version that PyTorch was built with."""
    version = torch.version.cuda
    return f"cupy-cuda{version.partition('.')[0]}x" if version else "cupy-cuda13x"


def forward(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, g: Geometry
) -> Tensor:
    """Return the output (N, C_out, D_out, H_out, W_out) in the input's dtype, channels-last."""
    return _forward(runtime(), input, offset, weight, bias, mask, g)


def backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    g: Geometry,
    needs: Sequence[bool],
) -> Gradients:
    """Return the gradients that `needs` (input, offset, weight, bias, mask) asks for."""
    return _backward(runtime(), grad, input, offset, weight, mask, g, needs)


def forward_fused_offset(
    input: Tensor,
    offset_weight: Tensor,
    offset_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    g: Geometry,
) -> Tensor:
    """Return the output; the kernel computes the offsets from offset_weight (3 * taps, C, 1, 1, 1) as it goes."""
    return _forward_fused_offset(runtime(), input, offset_weight, offset_bias, weight, bias, g)
