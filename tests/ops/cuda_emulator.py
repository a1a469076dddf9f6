"""CUDA kernels without a GPU: g++ compiles the kernel source, which runs over every block and every thread.

`cuda_shim.h` describes how a block of threads is emulated. It does not show speed, nor races between threads that no
barrier orders and that no order of the threads uncovers.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

SHIM = Path(__file__).with_name("cuda_shim.h")
STACK_BYTES = 256 * 1024 + 576
FLAGS = (
    f"-DDEFORM3D_STACK_BYTES={STACK_BYTES}",
    *("-std=c++17", "-O1", "-march=native", "-fPIC", "-shared", "-fno-gnu-unique", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-unknown-pragmas"),
)
SANITIZERS = ("-O0", "-g", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
SANITIZE = "DEFORM3D_SANITIZE_KERNELS"
# The limits of a launch on every GPU since Turing, without opting in to more.
MAX_THREADS, MAX_SHARED_BYTES, MAX_BLOCKS = 1024, 48 * 1024, 2**31 - 1
FORWARD, REVERSE, SHUFFLED = 0, 1, 7


class KernelLike(Protocol):
    """The identity of a kernel: `deform3d._launch.Kernel`."""

    @property
    def unit(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def options(self) -> tuple[str, ...]: ...


class KernelError(RuntimeError):
    """A launch that CUDA would refuse, or a block whose threads deadlock."""


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    kernel: Any
    grid: int
    block: tuple[int, int]
    shared_bytes: int
    args: tuple[int, ...]


@dataclass
class Compiler:
    """A compiler of kernel sources to shared libraries, each once, in `folder`."""

    folder: Path
    sanitize: bool = field(default_factory=lambda: SANITIZE in os.environ)
    libraries: dict[Path, ctypes.PyDLL] = field(default_factory=dict)

    def load(self, source: str, options: Sequence[str], name: str) -> ctypes.PyDLL:
        """Return the library with the entry `name` of `source`; raise KernelError with the compiler's message."""
        flags = (*FLAGS, *(SANITIZERS if self.sanitize else ()), *options, "-include", str(SHIM))
        text = f"{source}\nDEFORM3D_ENTRY({name})\n"
        key = hashlib.sha256("\0".join((text, SHIM.read_text(), *flags)).encode()).hexdigest()[:16]
        library = self.folder / f"{name}-{key}.so"
        if library not in self.libraries:
            if not library.exists():
                self._compile(text, flags, library)
            loaded = ctypes.PyDLL(str(library))
            loaded.deform3d_launch.restype = ctypes.c_char_p
            self.libraries[library] = loaded
        return self.libraries[library]

    def _compile(self, text: str, flags: Sequence[str], library: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        code = library.with_suffix(".cpp")
        code.write_text(text)
        unfinished = library.with_suffix(".tmp")
        # The compiler itself must not run under the sanitizer of this process.
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        command = ["g++", *flags, "-o", str(unfinished), str(code)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
        if done.returncode:
            raise KernelError(done.stderr)
        unfinished.rename(library)


@dataclass
class EmulatedRuntime:
    """A `deform3d._launch.Runtime` for CPU tensors, which runs and records every launch."""

    compiler: Compiler
    source: Callable[[str], str]
    tuning: Any = None
    order: int = FORWARD
    most_blocks: int = MAX_BLOCKS  # fewer than the launcher asks for, so that the kernels' loops over work repeat
    launches: list[Launch] = field(default_factory=list)

    def multiprocessors(self, device: torch.device) -> int:
        """Return a small number, so that loops over a grid smaller than the work run more than once."""
        return 3

    def launch(
        self,
        device: torch.device,
        kernel: KernelLike,
        grid: int,
        block: tuple[int, int],
        shared_bytes: int,
        args: Sequence[int],
    ) -> None:
        self.launches.append(Launch(kernel, grid, block, shared_bytes, tuple(args)))
        source = self.source(kernel.unit)
        bounds = re.search(rf"__launch_bounds__\((\d+)[^)]*\)\s+{kernel.name}\(", source)
        threads, most = block[0] * block[1], int(bounds[1]) if bounds else MAX_THREADS
        if not (0 < threads <= most and 0 < grid <= MAX_BLOCKS and 0 <= shared_bytes <= MAX_SHARED_BYTES):
            raise KernelError(
                f"{kernel.name}: got grid {grid}, block {block}, {shared_bytes} shared bytes, which no GPU launches; "
                f"expected at most {most} threads and {MAX_SHARED_BYTES} bytes"
            )
        library = self.compiler.load(source, kernel.options, kernel.name)
        expected = library.deform3d_arguments()
        if len(args) != expected:
            raise KernelError(f"{kernel.name}: got {len(args)} arguments, its signature has {expected}")
        if not all(type(a) is int and -(2**63) <= a < 2**63 for a in args):
            raise KernelError(f"{kernel.name}: got {args}, expected integers of 64 bits")
        problem = library.deform3d_launch(
            (ctypes.c_int64 * len(args))(*args),
            min(grid, self.most_blocks),
            *block,
            ctypes.c_size_t(shared_bytes),
            self.order,
            _stacks(),
        )
        if problem:
            raise KernelError(f"{kernel.name}: {problem.decode()}")


@functools.cache
def _stacks() -> ctypes.Array[ctypes.c_char]:
    """Return the stacks of a block's threads, reused by all launches: mapping them takes longer than most launches.

    They are mapped, not allocated, so that a sanitizer neither fills nor guards them; unused, they take no memory.
    """
    memory = mmap.mmap(-1, MAX_THREADS * STACK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return (ctypes.c_char * len(memory)).from_buffer(memory)


def missing_compiler() -> str:
    """Return why kernels cannot be compiled here, or an empty text."""
    return "" if shutil.which("g++") else "g++ is not installed"


def sanitizer_environment() -> dict[str, str] | None:
    """Return the environment of a process whose kernels are compiled with sanitizers, or None if g++ has none.

    New memory, including that of tensors, is filled with bits that are NaN in every floating dtype.
    """
    # The C++ library, too: Python does not load it, and the sanitizer looks for its `throw` at the start.
    libraries = [_library(name) for name in ("libasan.so", "libstdc++.so.6")]
    options = "detect_leaks=0:detect_stack_use_after_return=0:malloc_fill_byte=255:max_malloc_fill_size=1000000000"
    more = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": options, SANITIZE: "1"}
    return {**os.environ, **more} if all(libraries) else None


def _library(name: str) -> str:
    """Return the path of a library of g++; empty if there is none, or only a linker script of that name."""
    done = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, timeout=60)
    path = Path(done.stdout.strip())
    return str(path) if path.is_absolute() and path.read_bytes()[:4] == b"\x7fELF" else ""
