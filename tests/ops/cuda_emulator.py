"""CUDA kernels without a GPU: the kernel source compiled by g++ and run over every block and every thread.

`cuda_shim.h` says how a block of threads is emulated. What it does not show: races between threads that a barrier does
not order either way round and that no order of the threads uncovers, and anything about speed.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

SHIM = Path(__file__).with_name("cuda_shim.h")
FLAGS = (
    *("-std=c++17", "-O1", "-march=native", "-fPIC", "-shared", "-fno-gnu-unique", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-unknown-pragmas"),
)
SANITIZERS = ("-g", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
# The limits of a launch that every GPU since Turing has, without opting in to more.
MOST_THREADS, MOST_SHARED_BYTES, MOST_BLOCKS = 1024, 48 * 1024, 2**31 - 1
FORWARD, REVERSE, SHUFFLED = 0, 1, 7


class KernelLike(Protocol):
    """What identifies a kernel: `deform3d._launch.Kernel`."""

    @property
    def unit(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def options(self) -> tuple[str, ...]: ...


class KernelError(RuntimeError):
    """A launch that CUDA would refuse, or a block whose threads wait for each other for ever."""


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
    """Compiles kernel sources to shared libraries, each once, in `folder`."""

    folder: Path
    sanitize: bool = False
    libraries: dict[Path, ctypes.PyDLL] = field(default_factory=dict)

    def load(self, source: str, options: Sequence[str], name: str) -> ctypes.PyDLL:
        """Return the library with the entry `name` of `source`; raises KernelError with the compiler's message."""
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
        done = subprocess.run(["g++", *flags, "-o", unfinished, code], capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise KernelError(done.stderr)
        unfinished.rename(library)


@dataclass
class EmulatedRuntime:
    """`deform3d._launch.Runtime` for CPU tensors: runs and records every launch."""

    compiler: Compiler
    source: Callable[[str], str]
    order: int = FORWARD
    launches: list[Launch] = field(default_factory=list)

    def multiprocessors(self, device: torch.device) -> int:
        """Few, so that the loops over a grid smaller than the work run more than once."""
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
        threads = block[0] * block[1]
        if not (0 < threads <= MOST_THREADS and 0 < grid <= MOST_BLOCKS and 0 <= shared_bytes <= MOST_SHARED_BYTES):
            raise KernelError(f"{kernel.name}: no GPU launches grid {grid}, block {block}, {shared_bytes} shared bytes")
        library = self.compiler.load(self.source(kernel.unit), kernel.options, kernel.name)
        expected = library.deform3d_arguments()
        if len(args) != expected:
            raise KernelError(f"{kernel.name}: got {len(args)} arguments, its signature has {expected}")
        if not all(type(a) is int and -(2**63) <= a < 2**63 for a in args):
            raise KernelError(f"{kernel.name}: got {args}, expected integers of 64 bits")
        problem = library.deform3d_launch(
            (ctypes.c_int64 * len(args))(*args), grid, *block, ctypes.c_size_t(shared_bytes), self.order
        )
        if problem:
            raise KernelError(f"{kernel.name}: {problem.decode()}")


def missing_compiler() -> str:
    """Say why kernels cannot be compiled here; empty where they can."""
    return "" if shutil.which("g++") else "g++ is not installed"


def sanitizer_environment() -> dict[str, str] | None:
    """The environment of a process whose kernels are compiled with sanitizers, or None where g++ has none.

    New memory, tensors' too, is filled with bits that no floating dtype takes for a number.
    """
    done = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, timeout=60)
    library = Path(done.stdout.strip())
    # Where there is none g++ prints the bare name; some distributions have a linker script of that name.
    if not library.is_absolute() or library.read_bytes()[:4] != b"\x7fELF":
        return None
    options = "detect_leaks=0:detect_stack_use_after_return=0:malloc_fill_byte=255:max_malloc_fill_size=1000000000"
    return {**os.environ, "LD_PRELOAD": str(library), "ASAN_OPTIONS": options}
