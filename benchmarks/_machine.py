"""What a benchmark ran on, as text for its results."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

import torch


def machine_lines() -> list[str]:
    """Processor, memory, threads, accelerator and versions: one fact per line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    packages = ("torch", "numpy", "numba", "llvmlite", "monai", "monailabel")
    versions = [f"{name} {version}" for name in packages if (version := _version(name))]
    return [
        f"date: {datetime.date.today().isoformat()}",
        f"processor: {_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB memory",
        f"instructions: {torch.backends.cpu.get_cpu_capability()}",
        f"threads: {torch.get_num_threads()}",
        f"accelerator: {accelerator}",
        f"system: {platform.system()} {platform.machine()}, Python {platform.python_version()}",
        f"versions: {', '.join(versions)}",
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
