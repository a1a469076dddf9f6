"""Launch shapes tried one field after the other, each time keeping the best over all stages and dtypes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from benchmarks.common.gpu_timing import Progress, Stopwatch
from torch import Tensor

from deform3d import _launch
from deform3d._checks import check
from deform3d._launch import Tuning
from deform3d.cuda import CupyRuntime

# The kernels are compiled for at most the default's threads; other sizes may grow.
_FEWER, _ANY = (0.25, 1 / 3, 0.5, 0.75), (0.25, 0.5, 2.0, 4.0)
# Has no effect on 3 x 3 x 3 kernels.
_IRRELEVANT = ("taps_at_once",)


def candidates(tuning: Tuning, field: str) -> list[Tuning]:
    """Return `tuning` with other values of one field."""
    now = getattr(tuning, field)
    step = 32 if field.endswith("_threads") else 1
    limited = field.endswith(("_threads", "_warps"))
    values = {max(step, round(factor * now / step) * step) for factor in (_FEWER if limited else _ANY)} - {now}
    return [dataclasses.replace(tuning, **{field: value}) for value in sorted(values)]


def tune(watch: Stopwatch, cases: Sequence[Sequence[Tensor]]) -> dict[str, list[dict[str, Any]]]:
    """Print and return launch shapes with their times over the default's, the geometric mean over the cases.

    Args:
        watch: measures.
        cases: leaves input, offset, weight, bias of one layer each.
    """
    runtime = CupyRuntime()
    passes = {"forward": [_forward(runtime, case) for case in cases]}
    passes["backward"] = [_backward(runtime, case) for case in cases]
    names = [field.name for field in dataclasses.fields(Tuning) if _is_size(field.name)]
    fields = {"forward": [name for name in names if name.startswith("forward_")]}
    fields["backward"] = [name for name in names if name not in fields["forward"]]
    progress = Progress(sum(len(candidates(Tuning(), name)) for name in names))
    tables = {}
    for title, runs in passes.items():
        runtime.tuning = best = Tuning(fast_forward=False)  # the fast forward has no sizes to choose
        default = [watch.milliseconds(run) for run in runs]
        lowest, tried = 1.0, [{"tuning": "default", "ratio": 1.0}]
        for field in fields[title]:
            for tuning in candidates(best, field):
                runtime.tuning = tuning
                try:
                    times = [watch.milliseconds(run) for run in runs]
                except Exception as error:  # a shape that this card, or the kernel, does not take
                    progress.step(f"{title}, {_changes(tuning)}: refused ({error})")
                    continue
                ratio = math.exp(sum(math.log(t / d) for t, d in zip(times, default, strict=True)) / len(times))
                tried.append({"tuning": _changes(tuning), "ratio": ratio})
                progress.step(f"{title}, {_changes(tuning)}: {ratio:.3f}")
                if ratio < lowest:
                    lowest, best = ratio, tuning
        tables[title] = sorted(tried, key=lambda row: row["ratio"])
        print(f"best for the {title}: {_changes(best)}, {lowest:.3f} of the default's time", flush=True)
    return tables


def _is_size(field: str) -> bool:
    """Check that a field is a size that matters here, not a choice between kernels."""
    return field not in _IRRELEVANT and not isinstance(getattr(Tuning(), field), bool)


def _changes(tuning: Tuning) -> str:
    default = Tuning(fast_forward=tuning.fast_forward)
    changed = {
        field.name: getattr(tuning, field.name)
        for field in dataclasses.fields(Tuning)
        if getattr(tuning, field.name) != getattr(default, field.name)
    }
    return ", ".join(f"{name}={value}" for name, value in changed.items()) or "default"


def _forward(runtime: CupyRuntime, case: Sequence[Tensor]) -> Callable[[], object]:
    input, offset, weight, bias = (tensor.detach() for tensor in case)
    g = check(input, offset, weight, bias, None, (1, 1, 1), (1, 1, 1), (1, 1, 1))
    return lambda: _launch.forward(runtime, input, offset, weight, bias, None, g)


def _backward(runtime: CupyRuntime, case: Sequence[Tensor]) -> Callable[[], object]:
    input, offset, weight, bias = (tensor.detach() for tensor in case)
    g = check(input, offset, weight, bias, None, (1, 1, 1), (1, 1, 1), (1, 1, 1))
    grad, needs = torch.randn_like(input), (True, True, True, True, False)
    return lambda: _launch.backward(runtime, grad, input, offset, weight, None, g, needs)
