"""CUDA kernels compiled to machine code for every architecture, without a GPU or a driver."""

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest
from nvrtc import Nvrtc, Program

from deform3d import _launch
from deform3d._launch import Kernel

Unit = tuple[str, tuple[str, ...]]  # a compilation: the name of a unit and its macros
ARCHITECTURES = ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"]


def units(kernels: Iterable[Kernel]) -> list[Unit]:
    return list(dict.fromkeys((kernel.unit, kernel.options) for kernel in kernels))


def is_fast_path(kernel: Kernel) -> bool:
    """Return whether a network runs this instance: 3x3x3, the widest loads, not float64."""
    defines = dict(kernel.defines)
    widest = {0: 8, 1: 8, 2: 4}
    instances = [k for k in _launch.all_kernels() if k.name == kernel.name]
    vector = max(dict(k.defines)["VECTOR"] for k in instances if dict(k.defines)["DTYPE"] == defines["DTYPE"])
    return defines["CUBE"] == 1 and defines["DTYPE"] in widest and defines["VECTOR"] == vector


FAST_PATH = [kernel for kernel in _launch.all_kernels() if is_fast_path(kernel)]


class Compiled:
    """Programs by unit and architecture, each compiled once."""

    def __init__(self, nvrtc: Nvrtc) -> None:
        self.nvrtc = nvrtc
        self.programs: dict[tuple[Unit, str], Program] = {}

    def get(self, wanted: list[Unit], architecture: str) -> dict[Unit, Program]:
        """Return the programs, or skip if this compiler does not know the architecture."""
        if architecture.replace("compute", "sm") not in self.nvrtc.architectures():
            pytest.skip(f"this NVRTC does not compile for {architecture}")
        missing = [unit for unit in wanted if (unit, architecture) not in self.programs]
        sources = {name: _launch.source(name) for name, _ in missing}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = pool.map(lambda unit: self.nvrtc.compile(sources[unit[0]], unit[1], architecture), missing)
            self.programs.update({(unit, architecture): program for unit, program in zip(missing, made, strict=True)})
        return {unit: self.programs[unit, architecture] for unit in wanted}


@pytest.fixture(scope="module")
def compiled():
    try:
        return Compiled(Nvrtc())
    except OSError as error:
        pytest.skip(f"NVRTC is not installed: {error}")


def check_programs(programs: dict[Unit, Program], kernels: Iterable[Kernel], *, assembled: bool = True) -> None:
    for unit, program in programs.items():
        assert program.machine_code[:4] == b"\x7fELF" or not assembled, f"{unit}: {program.log}"
        assert "warning" not in program.log, f"{unit}: {program.log}"
    for kernel in kernels:
        program = programs[kernel.unit, kernel.options]
        entry = re.search(rf"\.entry {kernel.name}\((.*?)\)", program.ptx, re.DOTALL)
        assert entry, f"{kernel}: not in {program.ptx[:2000]}"
        # The launcher passes every argument as 64 bits.
        sizes = set(re.findall(r"\.param \.(\w+)", entry[1]))
        assert sizes <= {"u64", "b64", "s64"}, f"{kernel}: parameters of {sizes}"
        assert kernel.name in program.usage or not assembled


# A sweep takes a core a minute. Without --runslow: every instance as PTX for the oldest architecture, which has the
# fewest instructions, and what a network runs as machine code for the one that is measured. The two 16-bit dtypes take
# the same code but for conversions: one of them is left out of each, bfloat16, which the oldest lacks, not there.
FLOAT16, BFLOAT16 = 0, 1
EVERY = [("compute_75", FLOAT16), *(pytest.param(name, None, marks=pytest.mark.slow) for name in ARCHITECTURES)]
EVERY.append(pytest.param("compute_75", None, marks=pytest.mark.slow))
FAST = [("sm_90", BFLOAT16), *(pytest.param(name, None, marks=pytest.mark.slow) for name in ARCHITECTURES)]


def without(dtype: int | None, kernels: Iterable[Kernel]) -> list[Kernel]:
    return [kernel for kernel in kernels if dict(kernel.defines)["DTYPE"] != dtype]


@pytest.mark.parametrize(("architecture", "left_out"), EVERY)
def test_every_instance(compiled, architecture, left_out):
    kernels = without(left_out, _launch.all_kernels())
    programs = compiled.get(units(kernels), architecture)
    check_programs(programs, kernels, assembled=architecture.startswith("sm"))


@pytest.mark.parametrize(("architecture", "left_out"), FAST)
def test_fast_path(compiled, architecture, left_out):
    """Every architecture gets machine code with arrays in registers: only a few bytes are spilled."""
    kernels = without(left_out, FAST_PATH)
    programs = compiled.get(units(kernels), architecture)
    check_programs(programs, kernels)
    for kernel in kernels:
        program = programs[kernel.unit, kernel.options]
        usage = program.usage[kernel.name]
        print(f"{architecture} {kernel.name} {' '.join(kernel.options)}: {usage}")
        assert not re.search(r"\.local\b", program.ptx), f"{kernel}: an array is not in registers"
        # The kernels that are measured, on an H200 without fusion, spill nothing in their innermost loop.
        measured = architecture == "sm_90" and not dict(kernel.defines).get("FUSED")
        allowed = SPILLS.get(kernel.name, 0 if measured else 128)
        assert usage.spill_bytes <= allowed, f"{kernel}: {usage}"


# Kernels that use all registers spill counters of outer loops, and a few of 24 sums of 16-bit channels.
SPILLS = {"deform_backward_taps": 320, "deform_cell_gather": 128}
GATHERING_NAMES = ("deform_forward", "deform_forward_walk", "deform_backward_samples", "deform_backward_taps")
GATHERING = [
    pytest.param(
        kernel,
        id=" ".join((kernel.name, *kernel.options)),
        marks=pytest.mark.slow if dict(kernel.defines)["DTYPE"] == BFLOAT16 else (),
    )
    for kernel in FAST_PATH
    if kernel.name in GATHERING_NAMES
]


@pytest.mark.parametrize("kernel", GATHERING)
def test_vector_loads(compiled, kernel):
    (program,) = compiled.get(units([kernel]), "sm_90").values()
    loads = re.findall(r"ld\.global(?:\.\w+)*\.v4\.\w?32", program.ptx)
    assert len(loads) >= 9, f"{kernel}: {len(loads)} loads of 128 bits, expected those of eight corners and the weight"


@pytest.mark.parametrize("left_out", [BFLOAT16, pytest.param(None, marks=pytest.mark.slow)])
def test_no_tap_beyond_the_last(compiled, left_out):
    """An unrolled loop over an unknown number of taps needs a check between its copies, which NVRTC 13 omits."""
    kernels = [k for k in _launch.all_kernels() if k.name == "deform_forward" and not dict(k.defines)["CUBE"]]
    kernels = without(left_out, kernels)
    for unit, program in compiled.get(units(kernels), "sm_90").items():
        reads = re.findall(r"ld\.shared\.u8", program.ptx)
        assert len(reads) <= 2, (
            f"{unit}: a sample's corners are read in {len(reads)} places, expected two loops, without and with a mask"
        )
