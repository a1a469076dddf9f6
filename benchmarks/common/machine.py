"""Facts of the machine that a benchmark ran on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

_GPU_PACKAGES = ("triton", "cupy-cuda13x", "cupy-cuda12x", "cupy-cuda11x", "cupy")


def machine_lines() -> list[str]:
    """Return processor, memory, threads, accelerator and versions, one fact per line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    packages = ("torch", "numpy", "numba", "llvmlite", "monai", "monailabel")
    packages += _GPU_PACKAGES if torch.cuda.is_available() else ()
    versions = [f"{name} {version}" for name in packages if (version := _version(name))]
    return [
        f"date: {datetime.date.today().isoformat()}",
        f"processor: {_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB memory",
        f"instructions: {torch.backends.cpu.get_cpu_capability()}",
        f"threads: {torch.get_num_threads()}",
        f"accelerator: {accelerator}",
        *_card(),
        f"system: {platform.system()} {platform.machine()}, Python {platform.python_version()}",
        f"versions: {', '.join(versions)}",
    ]


def software_lines() -> list[str]:
    """Return those of ``machine_lines`` on which results depend that are no times."""
    return [line for line in machine_lines() if line.startswith(("date", "system", "versions"))]


def _card() -> list[str]:
    """Return the GPU's sizes and highest clocks, its driver and CUDA versions; nothing without a GPU."""
    if not torch.cuda.is_available():
        return []
    card = torch.cuda.get_device_properties()
    sizes = f"{card.multi_processor_count} multiprocessors, {card.total_memory / 2**30:.0f} GiB memory"
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, check=True, capture_output=True, text=True, timeout=30).stdout.splitlines()
        driver, clock, memory_clock = (part.strip() for part in answer[torch.cuda.current_device()].split(","))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        driver = clock = memory_clock = "unknown"
    return [
        f"card: {sizes}, compute capability {card.major}.{card.minor}, at most {clock}, memory {memory_clock}",
        f"driver: {driver}; PyTorch's CUDA: {torch.version.cuda}; cuDNN: {torch.backends.cudnn.version()}",
    ]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        facts = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        facts = {key.strip(): value.strip() for key, value in facts.items()}
        if "model name" in facts:
            return f"{facts['model name']} (family {facts.get('cpu family')}, model {facts.get('model')})"
    return platform.processor() or "unknown"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
