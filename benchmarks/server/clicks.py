"""A click over HTTP, from request to reply, and the memory of a server in which ten annotators click.

    python -m benchmarks.server.clicks

Starts real servers with ``deformux-label serve``. The weights are the pretrained ones of another organ: the cost of a
click does not depend on whether the mask is right. Writes data/clicks_server.json and the section clicks_server of
clicks_speed.md.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from benchmarks.common.machine import machine_lines
from benchmarks.common.places import CT
from benchmarks.common.report import Section, add_results, bullets, markdown_table, measure_and_write
from benchmarks.server.running import Client, serving, state_of
from requests_toolbelt import MultipartDecoder
from rich.progress import track

from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import ModelCard, load_model
from deformux.networks.pretrained import pretrained_path
from deformux.publishing.model_versions import ModelVersions
from deformux_label.lib.configs.project import Project

ONE = {"labels": "anterior,posterior", "modality": "ct", "spacing": "native", "patch_size": "96,96,96"}
# Sixty labels make a volume's logits large, so that ten volumes do not fit into the cache.
MANY = {**ONE, "labels": ",".join(f"organ {n}" for n in range(1, 61)), "cache_gb": "1"}
LIMITS = {"median_s": 1.0, "p95_s": 2.0, "not_network_share": 0.25}


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", type=Path, default=CT / "example_ct.nii.gz")
    parser.add_argument("--clicks", type=int, default=50, help="on the scan")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--all-clicks", type=int, default=500, help="of all clients together")
    parser.add_argument("--burst", type=int, default=10, help="clicks of a client before the next client's turn")
    parser.add_argument("--size", type=int, default=96, help="voxels along each axis of a client's volume")
    add_results(parser)
    args = parser.parse_args()
    measure_and_write(args, "clicks_server", lambda: measured(args), section)


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Click on one scan, and on those of many clients."""
    with tempfile.TemporaryDirectory() as folder:
        studies = [Path(folder) / name / "studies" for name in ("one", "many")]
        try:
            result = {"one": one_scan(studies[0], args), "many": many_clients(studies[1], args)}
        finally:
            for each, conf in zip(studies, (ONE, MANY), strict=True):
                shutil.rmtree(state_of(each, conf), ignore_errors=True)
    return result | {"limits": LIMITS, "machine": machine_lines()}


def one_scan(studies: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Click in sessions of ten, one after another, each request with all clicks of its session so far."""
    studies.mkdir(parents=True)
    shutil.copy(args.scan, studies / "scan.nii.gz")
    size = nib.load(args.scan).shape
    publish(studies, ONE)
    rng = random.Random(0)
    with serving(studies, ONE) as server:
        start = time.perf_counter()
        server.client.post("infer/segmentation", params={"image": "scan"})
        first_s = time.perf_counter() - start
        click(server.client, "scan", {})  # compiles the kernels of an edit
        times = []
        for number in track(range(args.clicks), description="clicks on the scan"):
            if number % 10 == 0:
                points: dict[str, list[list[int]]] = {}
            points.setdefault(rng.choice(["anterior", "posterior", "background"]), []).append(voxel(size, rng))
            times.append(click(server.client, "scan", points))
    total = [each["total_s"] for each in times]
    other = [each["total_s"] - each["network_s"] for each in times]
    return {
        "voxels": list(size),
        "clicks": len(times),
        "segmentation_s": first_s,
        "median_s": statistics.median(total),
        "p95_s": float(np.percentile(total, 95)),
        "max_s": max(total),
        "network_median_s": statistics.median(each["network_s"] for each in times),
        "not_network_median_s": statistics.median(other),
        "not_network_share": sum(other) / sum(total),
        "reply_bytes": statistics.median(each["bytes"] for each in times),
    }


def many_clients(studies: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Click in bursts of clients with a volume each, in random order, two at a time; return the server's memory."""
    size = (args.size,) * 3
    for number in range(args.clients):
        path = studies / f"case_{number}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(number).normal(0, 60, size).astype(np.int16)
        nib.save(nib.Nifti1Image(values, np.eye(4)), path)
    publish(studies, MANY)
    labels = MANY["labels"].split(",")
    per_client = args.all_clicks // args.clients
    bursts = [(n, start) for n in range(args.clients) for start in range(0, per_client, args.burst)]
    random.Random(0).shuffle(bursts)
    memory: list[float] = []
    with serving(studies, MANY) as server:
        idle = resident_mb(server.pid)

        def burst(client: int, start: int) -> None:
            rng = random.Random(1000 * client + start)
            points: dict[str, list[list[int]]] = {}
            for _ in range(start, min(start + args.burst, per_client)):
                points.setdefault(rng.choice([*labels, "background"]), []).append(voxel(size, rng))
                click(server.client, f"case_{client}", points, client_id=f"client {client}")
                memory.append(resident_mb(server.pid))

        with ThreadPoolExecutor(2) as pool:
            for done in track([pool.submit(burst, *each) for each in bursts], description="bursts of clicks"):
                done.result()
        state = server.client.get("deformux/sessions").json()
    fifth = max(1, len(memory) // 5)
    return {
        "clients": args.clients,
        "clicks": len(memory),
        "voxels": list(size),
        "idle_mb": idle,
        "first_fifth_max_mb": max(memory[:fifth]),
        "last_fifth_max_mb": max(memory[-fifth:]),
        "max_mb": max(memory),
        "end_mb": memory[-1],
        "memory_mb": memory[:: max(1, len(memory) // 50)],
        "sessions": state,
    }


def publish(studies: Path, conf: dict[str, str]) -> None:
    """Publish a version that takes clicks: the pretrained weights if the labels fit, else random ones."""
    project = Project.from_conf(conf)
    torch.manual_seed(0)
    network = DeformUXNet(1, len(project.labels) + 1, project.preset, guidance=True)
    card = ModelCard(
        labels=project.labels,
        preprocessing=project.preprocessing,
        preset=project.preset,
        network_options={"guidance": True},
    )
    pretrained, known = load_model(pretrained_path("hippocampus"))
    if len(known.labels) == len(project.labels) and known.preset == project.preset:
        network.load_state_dict(pretrained.state_dict(), strict=False)
    versions = ModelVersions(state_of(studies, conf) / "versions")
    versions.publish(versions.write(network, card))


def click(client: Client, image: str, points: dict[str, Any], **params: Any) -> dict[str, float]:
    """Edit as Slicer does; return seconds from request to reply, those of the network, and the reply's size."""
    form = {"params": (None, json.dumps({**points, **params, "result_extension": ".nrrd", "result_dtype": "uint8"}))}
    start = time.perf_counter()
    answer = client.post("infer/edit", params={"image": image}, files=form)
    total = time.perf_counter() - start
    parts = MultipartDecoder.from_response(answer).parts
    (reply,) = [part.text for part in parts if b'name="params"' in part.headers[b"Content-Disposition"]]
    return {
        "total_s": total,
        "network_s": json.loads(reply)["latencies"]["network"],
        "bytes": len(answer.content),
    }


def voxel(size: tuple[int, ...], rng: random.Random) -> list[int]:
    """Return a random voxel of a volume."""
    return [rng.randrange(n) for n in size]


def resident_mb(process: int) -> float:
    """Return the resident memory of a process in megabytes (10^6 bytes)."""
    status = Path(f"/proc/{process}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024 / 1e6


def section(result: Mapping[str, Any]) -> Section:
    """Write times and memory as tables."""
    one, many, limits = result["one"], result["many"], result["limits"]
    scan, volume = (" x ".join(map(str, each["voxels"])) for each in (one, many))
    rows = [
        ("a click, request to reply, median", f"**{one['median_s']:.2f} s**", f"{limits['median_s']:.1f} s"),
        ("95th percentile", f"**{one['p95_s']:.2f} s** (max {one['max_s']:.2f} s)", f"{limits['p95_s']:.1f} s"),
        ("of it the network, median", f"{1000 * one['network_median_s']:.0f} ms", ""),
        (
            "of it all else",
            f"**{100 * one['not_network_share']:.0f} %** (median {1000 * one['not_network_median_s']:.0f} ms)",
            f"{100 * limits['not_network_share']:.0f} %",
        ),
        ("the automatic segmentation before", f"{one['segmentation_s']:.1f} s", ""),
    ]
    kept = many["sessions"]
    memory_rows = [
        ("before the first click", f"{many['idle_mb']:.0f} MB"),
        ("most in the first fifth of the clicks", f"{many['first_fifth_max_mb']:.0f} MB"),
        ("most in the last fifth of the clicks", f"**{many['last_fifth_max_mb']:.0f} MB**"),
        ("most at any time", f"{many['max_mb']:.0f} MB"),
        ("kept for sessions at the end", f"{kept['bytes'] / 1e6:.0f} of {kept['most_bytes'] / 1e6:.0f} MB"),
        ("volumes and editors kept at the end", f"{kept['volumes']} and {kept['editors']}"),
        ("evictions", f"{kept['evictions']}"),
    ]
    lines = [
        "Real servers (`deformux-label serve`) and real requests on one machine; preset `tiny`, windows of 96³ voxels.",
        "",
        f"{one['clicks']} clicks on `example_ct.nii.gz` ({scan} voxels), in sessions of ten: each request holds all",
        "clicks of its session so far.",
        "",
        *markdown_table(("what", "measured", "target"), rows),
        f"{many['clients']} clients, each with a volume of {volume} voxels and {MANY['labels'].count(',') + 1} labels, "
        f"two at a time, {many['clicks']} clicks in all, `cache_gb` 1:",
        "",
        *markdown_table(("resident memory of the server", "measured"), memory_rows),
        *bullets(result["machine"]),
    ]
    return Section("clicks_speed", "clicks_server", "Clicks through the server", lines)


if __name__ == "__main__":
    main()
