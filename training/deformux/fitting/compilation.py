"""Compiling the network of a training on a GPU: whether it pays, and where the compiled code is kept."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from deformux.data.atomic_files import write_text
from deformux.fitting.training_step import TrainingStep

__all__ = ["Compilation", "CompileOnce"]

logger = logging.getLogger(__name__)

# Measured on an H200 with captured steps in bfloat16: `tiny` at 2×32×48×32 from 8.5 to 4.7 ms, `base` at 2×96³ from
# 105 to 65.
_SAVED = 0.35
# Time of the first compilation of a network, measured as 70 to 110, and of one in the cache, 3 to 7.
_SECONDS, _SECONDS_AGAIN = 110.0, 10.0
# The steps whose pace shows whether compiling pays; the first ones compile kernels and capture graphs.
_PACE_FROM, _PACE_TO = 20, 60


class Compilation:
    """Decides by the time that is left, and remembers how long compiling took.

    Args:
        network: values that identify a compiled network: preset, classes, patch and batch size.
        cache: folder for compiled code, so that the next training of the same network compiles in seconds; None for
            the compiler's own, in which case every training counts as the first.
    """

    def __init__(self, network: Mapping[str, Any], *, cache: Path | None) -> None:
        self.cache = cache
        identity = {**network, "torch": torch.__version__, "gpu": _gpu()}
        self._name = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @property
    def seconds(self) -> float:
        """Seconds that compiling will take."""
        if self.cache is not None:
            with contextlib.suppress(OSError, ValueError):
                return float((self.cache / f"{self._name}.seconds").read_text())
        return _SECONDS

    def pays(self, seconds_left: float) -> bool:
        """Return whether a training with this much time left ends sooner with compiling."""
        able = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
        return able and _SAVED * seconds_left > 1.5 * self.seconds

    def begin(self) -> None:
        """Call before the first compiled step."""
        self._began = time.monotonic()
        logger.info("compiling the network, which takes about %.0f s", self.seconds)
        if self.cache is not None:
            self.cache.mkdir(parents=True, exist_ok=True)
            # Read at every compilation; a folder that the user has set stays.
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(self.cache))

    def end(self) -> None:
        """Call after the first compiled step; the compiled code is now in the cache."""
        taken = time.monotonic() - self._began
        logger.info("compiling took %.0f s", taken)
        if self.cache is not None:
            write_text(self.cache / f"{self._name}.seconds", f"{min(taken, _SECONDS_AGAIN):.1f}")


class CompileOnce:
    """Compiles the network of a training once, if the pace of its first steps shows that this pays for the rest.

    Args:
        compilation: of the network.
        take_step: takes the steps.
        first_step: step after which this process took over.
        steps: of the whole training.
        any_process: returns whether a flag is set in any of the processes that train together.
    """

    def __init__(
        self,
        compilation: Compilation,
        take_step: TrainingStep,
        *,
        first_step: int,
        steps: int,
        any_process: Callable[[bool], bool],
    ) -> None:
        self.compilation, self.take_step, self.any_process = compilation, take_step, any_process
        self.first_step, self.steps = first_step, steps
        self._pace_began = 0.0

    def after_step(self, step: int) -> None:
        """Measure the pace, decide, or note how long compiling took: call after each step."""
        taken = step - self.first_step
        if taken == _PACE_FROM:
            self._pace_began = time.monotonic()
        elif taken == _PACE_TO:
            pace = (time.monotonic() - self._pace_began) / (_PACE_TO - _PACE_FROM)
            if self.any_process(self.compilation.pays(pace * (self.steps - step))):
                self.compilation.begin()
                self.take_step.compile()
        elif taken == _PACE_TO + 1 and self.take_step.compiled:
            self.compilation.end()


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""
