"""Inference of the published network on a GPU: calls captured and not, and an automatic segmentation by stages.

    python -m benchmarks.server.inference_gpu
    python -m benchmarks.server.inference_gpu --device cpu --preset tiny --size 96,96,64 --only segmentation

The weights are untrained, with offsets as after some training: their values do not change the time. A call is timed
as a click makes it (64³ voxels with guidance) and as a segmentation does (96³ without). Needs neither the app nor MONAI
Label. Writes data/inference_gpu.json and the section inference_gpu of inference.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from benchmarks.common.machine import machine_lines
from benchmarks.common.report import Section, add_results, bullets, markdown_table, measure_and_write
from torch import Tensor

from deformux.data.preprocessing import Preprocessing
from deformux.data.transforms import inference_transforms, restore_transforms, run_transforms
from deformux.inference.captured_network import CapturedNetwork, CaptureOptions
from deformux.inference.sliding_window import WindowInferer
from deformux.networks.blocks import DeformableMixer
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.precision import mixed_precision
from deformux.networks.presets import PRESETS

CLICK, WINDOW = (64, 64, 64), (96, 96, 96)
LIMIT_S = 5.0
# Guidance channels that a click fills: two labels' clicks, and as many labels in the mask.
CHANNELS = (0, 2, 15, 16, 20)
VARIANTS: dict[str, dict[str, bool]] = {"captured": {}}
COMPILED = {"compiled": {"compiled": True}}


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="base")
    parser.add_argument("--classes", type=int, default=14, help="background included")
    parser.add_argument("--size", default="512,512,300", help="voxels of the scan")
    parser.add_argument("--only", choices=("calls", "segmentation"))
    parser.add_argument("--compiled", action="store_true", help="compiled networks too: minutes more")
    add_results(parser)
    args = parser.parse_args()
    measure_and_write(args, "inference_gpu", lambda: measured(args), section)


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Time calls and a segmentation."""
    network = untrained(args.preset, args.classes).to(args.device).eval()
    result: dict[str, Any] = {"preset": args.preset, "classes": args.classes, "device": args.device}
    if args.only != "segmentation":
        result["calls"] = calls(network, args.device, compiled=args.compiled)
    if args.only != "calls":
        size = tuple(int(n) for n in args.size.split(","))
        result["segmentation"] = segmentation(network, size, args.device)
    return {**result, "machine": machine_lines()}


def untrained(preset: str, classes: int) -> DeformUXNet:
    """Return a network whose offsets and guidance are not zero, as they are at initialisation."""
    torch.manual_seed(0)
    network = DeformUXNet(1, classes, preset, guidance=True)
    for module in network.modules():
        if isinstance(module, DeformableMixer):
            torch.nn.init.normal_(module.offset.weight, std=0.3 / module.offset.in_channels**0.5)
    for name, parameter in network.named_parameters():
        if name.endswith("guidance"):
            torch.nn.init.normal_(parameter, std=0.1)
    return network


def calls(network: DeformUXNet, device: str, *, compiled: bool) -> list[dict[str, Any]]:
    """Return milliseconds and differences of each way to call the network."""
    x = torch.rand(4, 1, *WINDOW, device=device)
    click = torch.rand(1, 1, *CLICK, device=device)
    guidance = torch.zeros(1, network.guidance_channels, *CLICK, device=device)
    used = [channel for channel in CHANNELS if channel < network.guidance_channels]
    guidance[:, used] = torch.rand(1, len(used), *CLICK, device=device).gt(0.5).float()
    kinds: dict[str, tuple[Tensor, ...]] = {
        "click": (click, guidance),
        "window": (x[:1],),
        "2 windows": (x[:2],),
        "4 windows": (x,),
    }

    @torch.inference_mode()
    def eager(*inputs: Tensor) -> Tensor:
        with mixed_precision(device):
            return network(*inputs).float()

    rows = [row("one kernel after another", eager, kinds, eager)]
    for name, options in (VARIANTS | (COMPILED if compiled else {})).items():
        captured = CapturedNetwork(network, device, options=CaptureOptions(calls_before=0, **options))
        # Only some are worth compiling for a minute each.
        some = {kind: kinds[kind] for kind in ("click", "2 windows")} if "compiled" in name else kinds
        rows.append(row(name, captured, some, eager))
        print(rows[-1], flush=True)
        del captured
        torch.cuda.empty_cache()
    return rows


def row(
    name: str, run: Callable[..., Tensor], kinds: dict[str, tuple[Tensor, ...]], expected: Callable[..., Tensor]
) -> dict[str, Any]:
    """Time one way to call the network, for all kinds of calls."""
    result: dict[str, Any] = {"name": name}
    for kind, inputs in kinds.items():
        began = time.perf_counter()
        actual = run(*inputs)
        synchronize()
        first_s = time.perf_counter() - began
        exact = expected(*inputs)
        found: dict[str, Any] = {
            "first_s": first_s,
            "distance": float((actual - exact).norm() / exact.norm()),
            "classes_differ": float((actual.argmax(1) != exact.argmax(1)).float().mean()),
        }
        del actual, exact
        for _ in range(2):
            run(*inputs)
        found["ms"] = 1000 * statistics.median(seconds(lambda: run(*inputs)) for _ in range(10))  # noqa: B023 - at once
        result[kind] = found
    return result


def seconds(run: Callable[[], object]) -> float:
    """Return the seconds of a call, the GPU's work included."""
    synchronize()
    began = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def segmentation(network: DeformUXNet, size: tuple[int, ...], device: str) -> dict[str, Any]:
    """Time each stage, captured and not, from a compressed file to a compressed file."""
    prep = Preprocessing("ct", patch_size=WINDOW)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scan.nii.gz"
        nib.save(nib.Nifti1Image(phantom(size), np.diag([-0.8, -0.8, 1.5, 1.0])), path)
        ways: dict[str, Callable[[], Callable[..., Tensor]]] = {
            "captured": lambda: CapturedNetwork(network, device),
            "one kernel after another": lambda: network,
        }
        if not device.startswith("cuda"):
            del ways["captured"]
        # The first run of all warms up what later ones share, such as files in memory.
        stages(next(iter(ways.values()))(), path, prep, device)
        return {"voxels": list(size), **{name: stages(make(), path, prep, device) for name, make in ways.items()}}


@torch.inference_mode()
def stages(network: Callable[..., Tensor], path: Path, prep: Preprocessing, device: str) -> dict[str, Any]:
    """Time one segmentation of a file; recording the calls is part of it."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = {}
    began = time.perf_counter()

    def note(stage: str) -> None:
        nonlocal began
        synchronize()
        found[stage], began = time.perf_counter() - began, time.perf_counter()

    read, *rest = inference_transforms(prep, device=device)
    loaded = run_transforms([read], {"image": path})
    note("read")
    image = run_transforms(rest, loaded)["image"]
    note("prepare")
    logits = WindowInferer(WINDOW)(image[None].to(device), network)[0]
    note("windows")
    labels = run_transforms(restore_transforms(), {"image": image, "pred": logits})["pred"]
    note("restore")
    target = path.with_name("labels.nii.gz")
    nib.save(nib.Nifti1Image(labels[0].numpy(), labels.affine.numpy()), target)
    note("write")
    result: dict[str, Any] = {"total_s": sum(found.values()), "stages_s": found}
    if device.startswith("cuda"):
        result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return result


def phantom(size: tuple[int, ...]) -> np.ndarray:
    """Return a body in air in int16, with a scanner's noise, which decides the time of compression."""
    rng = np.random.default_rng(0)
    x, y = np.ogrid[: size[0], : size[1]]
    body = ((x / size[0] - 0.5) / 0.41) ** 2 + ((y / size[1] - 0.5) / 0.32) ** 2 < 1
    noise = rng.normal(0, 20, (*size[:2], 16)).astype(np.int16)
    layers = np.resize(np.arange(16), size[2])
    return np.where(body[..., None], 40, -1000).astype(np.int16) + noise[..., layers]


def section(data: Mapping[str, Any]) -> Section:
    """Write calls and segmentations as tables."""
    lines = [f"`DeformUXNet`, preset `{data['preset']}`, {data['classes']} classes, bfloat16 autocast.", ""]
    if "calls" in data:
        lines += _calls_table(data["calls"])
    if "segmentation" in data:
        lines += _segmentation_table(data["segmentation"])
    return Section("inference", "inference_gpu", "Inference on a GPU", [*lines, *bullets(data["machine"])])


def _calls_table(calls: list[dict[str, Any]]) -> list[str]:
    kinds = [kind for kind in calls[0] if kind != "name"]
    rows = []
    for each in calls:
        cells = [
            f"{each[kind]['ms']:.2f} ({each[kind]['distance']:.0e}, {100 * each[kind]['classes_differ']:.2f} %)"
            if kind in each
            else ""
            for kind in kinds
        ]
        first = max(each[kind]["first_s"] for kind in kinds if kind in each)
        rows.append((each["name"], *cells, f"{first:.2f} s"))
    return [
        "Milliseconds of a call (median of 10); in brackets, the distance of the logits from the first row's, and "
        "the part of the voxels whose class differs; untrained networks are undecided nearly everywhere.",
        "",
        *markdown_table(("", *kinds, "first call of a kind"), rows),
    ]


def _segmentation_table(found: dict[str, Any]) -> list[str]:
    rows = []
    for name, each in found.items():
        if name != "voxels":
            parts = (f"{value:.2f} s" for value in each["stages_s"].values())
            peak = f"{each['peak_gb']:.1f} GB" if "peak_gb" in each else ""
            rows.append((name, f"**{each['total_s']:.2f} s**", *parts, peak))
    return [
        f"Automatic segmentation of {'×'.join(map(str, found['voxels']))} voxels, from a `.nii.gz` to a `.nii.gz`, "
        f"windows of {'×'.join(map(str, WINDOW))}; target {LIMIT_S:.0f} s.",
        "",
        *markdown_table(("", "total", "read", "prepare", "windows", "restore", "write", "peak memory"), rows),
    ]


if __name__ == "__main__":
    main()
