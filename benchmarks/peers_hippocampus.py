"""Equal steps, equal recipe: DeformUX-Net ``tiny`` against MONAI's networks on the hippocampus data.

    python benchmarks/peers_hippocampus.py --data ../shared/data/hippocampus [--steps 400] [--threads 2]

Trains on ``train``, scores ``val`` once at the end. Writes benchmarks/results/peers_hippocampus.{md,json} and, after
each network, what is done so far: a second call goes on from there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from _machine import machine_lines
from monai.networks.nets import UNETR, DynUNet, SegResNet, UNet
from torch import nn

from deformux.cases import find_cases
from deformux.engine import Progress, fit
from deformux.files import write_text
from deformux.inference import evaluate
from deformux.metrics import mean_dice
from deformux.network import DeformUXNet
from deformux.recipe import RECIPES
from deformux.transforms import Preprocessing

PATCH = (48, 64, 48)
LABELS = ("anterior", "posterior")
RESULTS = Path(__file__).parent / "results"


class _Classes(nn.Module):
    """A network of MONAI's with the one attribute that ``fit`` asks for."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.out_channels = len(LABELS) + 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "DeformUX-Net tiny": lambda: DeformUXNet(1, 3, "tiny"),
    "UNet": lambda: _Classes(UNet(3, 1, 3, (32, 64, 128, 256), (2, 2, 2), num_res_units=2)),
    "SegResNet": lambda: _Classes(SegResNet(3, 16, 1, 3)),
    "DynUNet": lambda: _Classes(
        DynUNet(3, 1, 3, [3] * 4, [1, 2, 2, 2], [2, 2, 2], filters=(24, 48, 96, 192), res_block=True)
    ),
    "UNETR": lambda: _Classes(
        UNETR(1, 3, PATCH, feature_size=12, hidden_size=192, mlp_dim=768, num_heads=6, proj_type="conv")
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    RESULTS.mkdir(exist_ok=True)
    stored = RESULTS / "peers_hippocampus.json"
    rows: dict[str, dict] = json.loads(stored.read_text())["rows"] if stored.is_file() else {}
    train, val = (find_cases(arguments.data, subset=subset) for subset in ("train", "val"))
    prep = Preprocessing("mr", patch_size=PATCH)
    recipe = RECIPES["finetune"].replace(
        steps=arguments.steps,
        epochs=10,
        ema_decay=0.99,
        flip_axes=(0,),
        foreground_ratio=1.0,
        affine_probability=0.8,
    )
    for name, make in NETWORKS.items():
        if rows.get(name, {}).get("steps") == arguments.steps:
            continue
        torch.manual_seed(0)
        network = make()

        def show(progress: Progress, name: str = name) -> None:
            print(
                f"\r{name}: {progress.step}/{progress.total_steps}, loss {progress.loss:.3f}, "
                f"{progress.eta_s:.0f} s left   ",
                end="",
                flush=True,
            )

        fit(network, train, recipe=recipe, prep=prep, labels=LABELS, on_progress=show)  # type: ignore[arg-type]
        scores = evaluate(network, val, prep, n_labels=len(LABELS))
        per_label = torch.tensor(list(scores.values())).nanmean(0).tolist()
        rows[name] = {
            "parameters": sum(p.numel() for p in network.parameters()),
            "steps": arguments.steps,
            "dice": dict(zip(LABELS, (round(value, 4) for value in per_label), strict=True)),
            "mean_dice": round(mean_dice(list(scores.values())), 4),
        }
        print(f"\n{name}: {rows[name]}", flush=True)
        write_text(
            stored, json.dumps({"machine": machine_lines(), "recipe": recipe.to_json(), "rows": rows}, indent=2) + "\n"
        )
        _write_table(rows, arguments.steps)
    _write_table(rows, arguments.steps)


def _write_table(rows: dict[str, dict], steps: int) -> None:
    lines = [
        f"# Equal steps on the hippocampus data ({steps} steps of batch 2, one recipe, seed 0)",
        "",
        *(f"- {line}" for line in machine_lines()),
        "- trained on 160 `train` cases, scored on 40 `val` cases once, whole volumes padded to 48×64×48",
        f"- measured so far: {len(rows)} of {len(NETWORKS)} networks",
        "",
        "| network | parameters | anterior | posterior | mean Dice |",
        "|---|---|---|---|---|",
    ]
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["mean_dice"]):
        dice = row["dice"]
        lines.append(
            f"| {name} | {row['parameters'] / 1e6:.1f} M | {dice['anterior']:.4f} | {dice['posterior']:.4f} | "
            f"{row['mean_dice']:.4f} |"
        )
    write_text(RESULTS / "peers_hippocampus.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
