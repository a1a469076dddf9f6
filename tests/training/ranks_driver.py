"""One of two processes that train together, for test_distributed.py; started by torchrun.

torchrun --nproc-per-node 2 ranks_driver.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from test_distributed import OPTIONS, RECIPE, network
from torch import nn

from deformux.data.cases import find_cases
from deformux.fitting.distributed import Ranks, joined
from deformux.fitting.fit import TrainingStopped, fit


def averaged(ranks: Ranks) -> dict[str, Any]:
    """Average gradients of rank + 1: one that all ranks have, one that only rank 0 has, and one that none has."""
    parameters = [nn.Parameter(torch.zeros(2, 3)) for _ in range(3)]
    parameters[0].grad = torch.full((2, 3), ranks.rank + 1.0)
    if ranks.rank == 0:
        parameters[1].grad = torch.full((2, 3), 1.0)
    loss = float(ranks.average(parameters, torch.tensor(3.0 * ranks.rank)))
    means = [None if p.grad is None else p.grad.unique().tolist() for p in parameters]
    broken = ranks.average(parameters, torch.tensor(float("nan") if ranks.rank else 1.0))
    module = nn.Conv3d(1, 1, 1).requires_grad_(False)
    module.weight.fill_(ranks.rank)
    ranks.broadcast(module)
    return {
        "loss": loss,
        "means": means,
        "nan": bool(broken.isnan()),
        "weight": module.weight.item(),
        "any_process": [ranks.any_process(ranks.rank == 1), ranks.any_process(False)],
        "gather": ranks.gather({"rank": ranks.rank}),
        "from_writer": ranks.from_writer(lambda: f"rank {ranks.rank}"),
        "part": list(ranks.part("abcde")),
    }


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    cases = find_cases(folder)
    with joined("cpu") as ranks:
        own = averaged(ranks)

        def train(name: str, stop_at: int = 0, **changes: Any) -> None:
            steps = 0

            def stop() -> bool:
                # Only one of them is asked to stop.
                nonlocal steps
                steps += 1
                return ranks.rank == 1 and steps == stop_at

            net = network()
            told: list[int] = []
            try:
                result = fit(
                    net,
                    cases[:3],
                    recipe=RECIPE.replace(**changes),
                    val_cases=cases[3:],
                    checkpoint=folder / "run" / "checkpoint.safetensors" if name != "whole" else None,
                    checkpoint_seconds=0,
                    stop=stop,
                    on_progress=lambda progress: told.append(progress.step),
                    ranks=ranks,
                    **OPTIONS,
                )
            except TrainingStopped:
                own[name] = {"stopped": steps}
                return
            save_file(net.state_dict(), folder / f"{name}-{ranks.rank}.safetensors")
            own[name] = {"losses": result.losses, "per_case": result.per_case, "from": result.resumed_from}
            own[name]["told"] = bool(told)

        train("whole")
        train("stopped", stop_at=3)
        train("resumed")
    (folder / f"{ranks.rank}.json").write_text(json.dumps(own))


if __name__ == "__main__":
    main()
