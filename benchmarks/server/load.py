"""Times of the annotation server while it works, and with ten thousand studies.

    python -m benchmarks.server.load [--login]

Starts real servers with ``deformux-label serve``. The weights are random and the labels are balls: neither changes the
times. Writes data/server.json and the section server of server.md; with ``--login`` both are named server_login.
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import requests
from benchmarks.common.machine import machine_lines
from benchmarks.common.report import add_results, measure_and_write
from benchmarks.server.load_page import section
from benchmarks.server.running import Client, Login, serving, state_of

from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import ModelCard
from deformux.publishing.model_versions import ModelVersions
from deformux_label.lib.configs.project import Project
from deformux_label.lib.store.leases import Leases
from deformux_label.web.users import Users

CONF = {"labels": "ball", "modality": "ct", "patch_size": "48,48,48"}
LIMITS = {
    "info_p99_ms": 100,
    "next_sample_p99_ms": 100,
    "start_s": 15,
    "publish_s": 1,
    "throughput_share": 0.4,
}


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30, help="length of each measurement under load")
    parser.add_argument("--studies", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=300, help="Next Samples of each strategy and number of leases")
    parser.add_argument("--login", action="store_true", help="with the login on; the results are named server_login")
    add_results(parser)
    args = parser.parse_args()
    name = "server_login" if args.login else "server"
    measure_and_write(args, name, lambda: measured(args), lambda data: section(name, data))


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Measure under load and with many studies."""
    with tempfile.TemporaryDirectory() as folder:
        login = None
        if args.login:
            login = Login("ada", secrets.token_hex(), Path(folder) / "users.json")
            Users(login.users).add(login.name, "admin", login.password)
        studies = [Path(folder) / name / "studies" for name in ("load", "many")]
        try:
            result = {**under_load(studies[0], args.seconds, login), **at_scale(studies[1], args, login)}
        finally:
            for each in studies:
                shutil.rmtree(state_of(each, CONF), ignore_errors=True)
    return result | {"limits": LIMITS, "machine": machine_lines()}


def under_load(studies: Path, seconds: float, login: Login | None) -> dict[str, Any]:
    """Time ``GET /info/`` beside inference and training, inference beside training, and publishing."""
    for number in range(6):
        scan(studies / f"case_{number}.nii.gz", 96, number)
    publish(studies)
    with serving(studies, CONF, login) as server:
        client = server.client
        for number in range(5):
            submit(client, f"case_{number}", studies.parent / "label.nii.gz")
        infer(client)  # compiles the kernels
        idle = quantiles(times_of(lambda: client.get("info/"), seconds / 3))
        alone = count_of(lambda: infer(client), seconds)
        task = client.post("train/segmentation", {"steps": 100_000}).json()
        while not client.get("info/").json()["train_stats"]["segmentation"].get("step"):
            time.sleep(0.2)
        with in_background(lambda: infer(client)) as done:
            busy = quantiles(times_of(lambda: client.get("info/"), seconds))
            during = len(done)
        beside = count_of(lambda: infer(client), seconds)
        assert client.get("train/").json()["id"] == task["id"], "the training ended before the measurement did"
        assert client.get("train/").json()["status"] == "RUNNING", client.get("train/").json()
        client.delete("train/")
        switches = [switch(client, studies) for _ in range(5)]
    return {
        "info_idle_ms": idle,
        "info_busy_ms": busy,
        "inferences_during_info": during,
        "inferences_per_minute_idle": 60 * alone / seconds,
        "inferences_per_minute_training": 60 * beside / seconds,
        "throughput_share": beside / alone,
        "publish_s": max(switches),
        "publish_overhead_s": [round(value, 3) for value in switches],
    }


def switch(client: Client, studies: Path) -> float:
    """Return seconds from publishing a version to its first answer, less those of the same inference right after."""
    name = publish(studies, serve=False)
    start = time.perf_counter()
    client.post(f"deformux/versions/{name}/publish", {})
    answer = infer(client)
    first = time.perf_counter() - start
    assert answer.json()["model_version"] == name, answer.text
    start = time.perf_counter()
    infer(client)
    return max(0.0, first - (time.perf_counter() - start))


def at_scale(studies: Path, args: argparse.Namespace, login: Login | None) -> dict[str, Any]:
    """Time the start of a server, from a fresh folder and from an index, and Next Sample with many studies."""
    first = scan(studies / "case_00000.nii.gz", 32, 0)
    for number in range(1, args.studies):
        os.link(first, studies / f"case_{number:05d}.nii.gz")
    publish(studies)
    with serving(studies, CONF, login) as fresh:
        pass
    with serving(studies, CONF, login) as server:
        client = server.client
        names = list(client.get("info/").json()["strategies"])
        held = {number: leases_held(studies, number) for number in (0, args.studies // 2)}
        samples = {number: next_samples(client, names, args.samples, hold) for number, hold in held.items()}
        info = quantiles(times_of(lambda: client.get("info/"), args.seconds))
    return {
        "studies": args.studies,
        "login": login is not None,
        "start_fresh_s": fresh.start_s,
        "start_s": server.start_s,
        "next_sample_ms": {str(number): values for number, values in samples.items()},
        "info_many_ms": info,
    }


def leases_held(studies: Path, number: int) -> Callable[[], None]:
    """Return a function by which others hold a number of leases, of the volumes that are first by name."""

    def hold() -> None:
        leases = Leases(state_of(studies, CONF) / "leases.json", most=number)
        cases = [f"case_{case:05d}" for case in range(number)]
        for case in cases:
            leases.claim("somebody else", [case])

    return hold


def next_samples(client: Client, names: Sequence[str], samples: int, hold: Callable[[], None]) -> dict[str, Any]:
    """Time Next Sample by strategy in milliseconds, each time with the same leases, in random turns."""
    hold()
    times: dict[str, list[float]] = {name: [] for name in names}
    rng = random.Random(0)
    for number in range(samples):
        for name in rng.sample(names, len(names)):
            start = time.perf_counter()
            answer = client.post(f"activelearning/{name}", {"client_id": f"annotator {number % 8}"})
            times[name].append(1000 * (time.perf_counter() - start))
            client.delete("deformux/leases", params={"image": answer.json()["id"]})
    return {name: quantiles(values) for name, values in times.items()}


def scan(path: Path, size: int, seed: int) -> Path:
    """Write a noisy volume with a ball, and beside the studies the ball's label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"))
    ball = np.linalg.norm(grid - size / 2, axis=0) < size / 4
    values = np.random.default_rng(seed).normal(0, 20, ball.shape) + 100 * ball
    nib.save(nib.Nifti1Image(values.astype(np.int16), np.eye(4)), path)
    nib.save(nib.Nifti1Image(ball.astype(np.uint8), np.eye(4)), path.parent.parent / "label.nii.gz")
    return path


def publish(studies: Path, *, serve: bool = True) -> str:
    """Write a version of random weights, and publish it."""
    project = Project.from_conf(CONF)
    versions = ModelVersions(state_of(studies, CONF) / "versions")
    card = ModelCard(labels=project.labels, preprocessing=project.preprocessing, preset=project.preset)
    name = versions.write(DeformUXNet(1, len(project.labels) + 1, project.preset), card)
    if serve:
        versions.publish(name)
    return name


def infer(client: Client) -> requests.Response:
    """Segment a volume of 96 x 96 x 96 voxels."""
    return client.post("infer/segmentation", params={"image": "case_5", "output": "json"})


def submit(client: Client, case: str, label: Path) -> None:
    """Submit a label."""
    with label.open("rb") as file:
        client.put("datastore/label", params={"image": case}, files={"label": ("label.nii.gz", file)})


def timed(call: Callable[[], Any]) -> float:
    """Return the milliseconds of a call."""
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def times_of(call: Callable[[], Any], seconds: float) -> list[float]:
    """Return the milliseconds of each call of a client that asks twenty times a second."""
    end = time.perf_counter() + seconds
    found = []
    while time.perf_counter() < end:
        found.append(timed(call))
        time.sleep(0.05)
    return found


def count_of(call: Callable[[], Any], seconds: float) -> float:
    """Count the calls, one after another, that fit into the time; the last one counts by its part."""
    start, number = time.perf_counter(), 0
    while True:
        before = time.perf_counter()
        call()
        now = time.perf_counter()
        if now - start >= seconds:
            return number + (start + seconds - before) / (now - before)
        number += 1


@contextmanager
def in_background(call: Callable[[], Any]) -> Iterator[list[None]]:
    """Call repeatedly in a thread; the list grows with each call that ended."""
    done: list[None] = []
    stop = threading.Event()

    def loop() -> None:
        while not stop.is_set():
            call()
            done.append(None)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()


def quantiles(values: list[float]) -> dict[str, float]:
    """Return median, 99th percentile, maximum and number."""
    p99 = statistics.quantiles(values, n=100, method="inclusive")[98]
    return {"p50": statistics.median(values), "p99": p99, "max": max(values), "n": len(values)}


if __name__ == "__main__":
    main()
