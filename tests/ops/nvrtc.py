"""Bindings to NVIDIA's runtime compiler for the tests: machine code for any architecture, without a driver."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_VERBOSE = "--ptxas-options=-v"


@dataclass(frozen=True)
class Usage:
    """The resources of a multiprocessor that one kernel uses."""

    registers: int
    stack_bytes: int
    spill_bytes: int


@dataclass(frozen=True)
class Program:
    """A compiled program; `machine_code` is empty if compilation failed, and `log` says why."""

    machine_code: bytes
    ptx: str
    log: str

    @property
    def usage(self) -> dict[str, Usage]:
        """Return the usage of each kernel, from the assembler's report."""
        pattern = (
            r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads.*?Used (\d+) registers"
        )
        return {
            name: Usage(int(registers), int(stack), int(stores) + int(loads))
            for name, stack, stores, loads, registers in re.findall(pattern, self.log, re.DOTALL)
        }


class Nvrtc:
    """The functions of the library; raises OSError if it is not installed."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(_find())

    def architectures(self) -> list[str]:
        """Return the architectures that it can compile for, such as "sm_90"."""
        count = ctypes.c_int()
        self._call("GetNumSupportedArchs", ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self._call("GetSupportedArchs", numbers)
        return [f"sm_{number}" for number in numbers]

    def compile(self, source: str, options: Sequence[str], architecture: str) -> Program:
        """Compile a CUDA source like CuPy; safe to call from several threads."""
        program = ctypes.c_void_p()
        self._call("CreateProgram", ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
        given = [option.encode() for option in ("-std=c++17", f"-arch={architecture}", _VERBOSE, *options)]
        failed = self._library.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
        log = self._text("ProgramLog", program).decode()
        code, ptx = (b"", b"") if failed else (self._text("CUBIN", program), self._text("PTX", program))
        self._call("DestroyProgram", ctypes.byref(program))
        return Program(code, ptx.rstrip(b"\0").decode(), log.rstrip("\0"))

    def _text(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"Get{what}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(f"Get{what}", program, text)
        return text.raw

    def _call(self, function: str, *arguments: object) -> None:
        if code := getattr(self._library, f"nvrtc{function}")(*arguments):
            raise RuntimeError(f"nvrtc{function}: got error {code}, expected success")


def _find() -> str:
    """Return the path of the library: among the wheels that PyTorch installs, or installed with CUDA."""
    wheels = importlib.util.find_spec("nvidia")
    for folder in (wheels.submodule_search_locations or ()) if wheels else ():
        # nvidia/cu13/lib, or nvidia/cuda_nvrtc/lib before CUDA 13
        for library in sorted(Path(folder).glob("*/lib/libnvrtc.so.*"), reverse=True):
            if "alt" not in library.name:
                return str(library)
    return ctypes.util.find_library("nvrtc") or "libnvrtc.so"
