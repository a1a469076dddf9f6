"""What the annotation server answers while it works, and with ten thousand studies.

``python -m benchmarks.server.load [--login]`` starts real servers with ``deformux-label serve`` and writes
``results/server.md`` and ``results/server.json``, or ``results/server_login.*``. The weights are random and the labels
are balls: neither changes anything about the times.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import requests
from benchmarks.common.machine import machine_lines
from benchmarks.common.server_page import table

from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import ModelCard
from deformux.publishing.model_versions import ModelVersions
from deformux_label.cli.common import app_folder
from deformux_label.lib.configs.project import Project
from deformux_label.lib.store.leases import Leases
from deformux_label.web.users import Users

HERE = Path(__file__).resolve().parents[1]
CONF = {"labels": "ball", "modality": "ct", "patch_size": "48,48,48"}
# Options of the server that are not the project's.
OF_SERVER: dict[str, str] = {}
# Name and password of who asks, where the login is on, and the token of each server.
LOGIN: list[str] = []
TOKENS: dict[str, str] = {}
LIMITS = {
    "info_p99_ms": 100,
    "next_sample_p99_ms": 100,
    "start_s": 15,
    "publish_s": 1,
    "throughput_share": 0.4,
}


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30, help="length of each measurement under load")
    parser.add_argument("--studies", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=300, help="Next Samples of each strategy and number of leases")
    parser.add_argument("--login", action="store_true", help="with the login on; the results go to server_login.*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.login:
            LOGIN.extend(("ada", secrets.token_hex()))
            OF_SERVER["users"] = str(Path(folder) / "users.json")
            Users(Path(OF_SERVER["users"])).add(LOGIN[0], "admin", LOGIN[1])
        studies = [Path(folder) / name / "studies" for name in ("load", "many")]
        try:
            result = {**under_load(studies[0], args.seconds), **at_scale(studies[1], args)}
        finally:
            for each in studies:
                shutil.rmtree(state_of(each), ignore_errors=True)
    result |= {"limits": LIMITS, "machine": machine_lines()}
    text = table(result)
    print(text)
    name = "server_login" if args.login else "server"
    (HERE / "results" / f"{name}.md").write_text(text)
    (HERE / "results" / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")


def under_load(studies: Path, seconds: float) -> dict[str, Any]:
    """``GET /info/`` beside inference and training, inference beside training, and publishing."""
    for number in range(6):
        scan(studies / f"case_{number}.nii.gz", 96, number)
    publish(studies)
    with serving(studies) as (url, _, _):
        for number in range(5):
            submit(url, f"case_{number}", studies.parent / "label.nii.gz")
        infer(url)  # compiles the kernels
        idle = quantiles(times_of(lambda: get(f"{url}/info/"), seconds / 3))
        alone = count_of(lambda: infer(url), seconds)
        task = post(f"{url}/train/segmentation", {"steps": 100_000}).json()
        while not get(f"{url}/info/").json()["train_stats"]["segmentation"].get("step"):
            time.sleep(0.2)
        with in_background(lambda: infer(url)) as done:
            busy = quantiles(times_of(lambda: get(f"{url}/info/"), seconds))
            during = len(done)
        beside = count_of(lambda: infer(url), seconds)
        assert get(f"{url}/train/").json()["id"] == task["id"], "the training ended before the measurement did"
        assert get(f"{url}/train/").json()["status"] == "RUNNING", get(f"{url}/train/").json()
        checked(requests.delete(f"{url}/train/", headers=headers(url), timeout=120))
        switches = [switch(url, studies) for _ in range(5)]
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


def switch(url: str, studies: Path) -> float:
    """Seconds from publishing a version to its first answer, less what the same inference takes right after."""
    name = publish(studies, serve=False)
    start = time.perf_counter()
    post(f"{url}/deformux/versions/{name}/publish", {})
    answer = infer(url)
    first = time.perf_counter() - start
    assert answer.json()["model_version"] == name, answer.text
    start = time.perf_counter()
    infer(url)
    return max(0.0, first - (time.perf_counter() - start))


def at_scale(studies: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Start of a server and Next Sample with many studies, from a fresh folder and from an index."""
    first = scan(studies / "case_00000.nii.gz", 32, 0)
    for number in range(1, args.studies):
        os.link(first, studies / f"case_{number:05d}.nii.gz")
    publish(studies)
    with serving(studies) as (_, fresh_s, _):
        pass
    with serving(studies) as (url, start_s, _):
        names = list(get(f"{url}/info/").json()["strategies"])
        held = {number: leases_held(studies, number) for number in (0, args.studies // 2)}
        samples = {number: next_samples(url, names, args.samples, hold) for number, hold in held.items()}
        info = quantiles(times_of(lambda: get(f"{url}/info/"), args.seconds))
    return {
        "studies": args.studies,
        "login": bool(LOGIN),
        "start_fresh_s": fresh_s,
        "start_s": start_s,
        "next_sample_ms": {str(number): values for number, values in samples.items()},
        "info_many_ms": info,
    }


def leases_held(studies: Path, number: int) -> Callable[[], None]:
    """What makes others hold that many leases, of the volumes that come first by name."""

    def hold() -> None:
        leases = Leases(state_of(studies) / "leases.json", most=number)
        cases = [f"case_{case:05d}" for case in range(number)]
        for case in cases:
            leases.claim("somebody else", [case])

    return hold


def next_samples(url: str, names: Sequence[str], samples: int, hold: Callable[[], None]) -> dict[str, Any]:
    """Milliseconds of Next Sample by strategy, each time with the same leases: the strategies take turns at random."""
    hold()
    times: dict[str, list[float]] = {name: [] for name in names}
    rng = random.Random(0)
    for number in range(samples):
        for name in rng.sample(names, len(names)):
            start = time.perf_counter()
            answer = post(f"{url}/activelearning/{name}", {"client_id": f"annotator {number % 8}"})
            times[name].append(1000 * (time.perf_counter() - start))
            query = {"image": answer.json()["id"]}
            checked(requests.delete(f"{url}/deformux/leases", params=query, headers=headers(url), timeout=300))
    return {name: quantiles(values) for name, values in times.items()}


def scan(path: Path, size: int, seed: int) -> Path:
    """A noisy volume with a ball, and beside the studies the ball's label."""
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
    versions = ModelVersions(state_of(studies) / "versions")
    card = ModelCard(labels=project.labels, preprocessing=project.preprocessing, preset=project.preset)
    name = versions.write(DeformUXNet(1, len(project.labels) + 1, project.preset), card)
    if serve:
        versions.publish(name)
    return name


def state_of(studies: Path, conf: Mapping[str, str] = CONF) -> Path:
    """Where a server keeps what it knows of a folder."""
    return Project.from_conf(conf).state_folder(app_folder(), str(studies))


@contextmanager
def serving(studies: Path, conf: Mapping[str, str] = CONF) -> Iterator[tuple[str, float, int]]:
    """A server's address, the seconds from its start to its first answer, and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    TOKENS.clear()
    command = [
        sys.executable,
        "-c",
        "from deformux_label.cli.main import app; app()",
        "serve",
        "--studies",
        str(studies),
    ]
    # A developer's own users must not switch the login on.
    nobody = {"users": str(studies.parent / "no-users.json")}
    for key, value in {**conf, **nobody, **OF_SERVER, "port": str(port)}.items():
        command += [f"--{key.replace('_', '-')}", value]
    start = time.perf_counter()
    with (studies.parent / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit((studies.parent / "server.log").read_text()[-3000:])
            try:
                get(f"{url}/info/")
                break
            except requests.ConnectionError:
                time.sleep(0.05)
        yield url, time.perf_counter() - start, process.pid
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def get(url: str) -> requests.Response:
    """A request that must succeed."""
    return checked(requests.get(url, headers=headers(url), timeout=300))


def post(url: str, body: dict[str, Any]) -> requests.Response:
    """A request that must succeed."""
    return checked(requests.post(url, json=body, headers=headers(url), timeout=300))


def headers(url: str) -> dict[str, str]:
    """Who asks: empty without a login; each server is asked for a token once."""
    if not LOGIN:
        return {}
    server = "/".join(url.split("/")[:3])
    if server not in TOKENS:
        name, password = LOGIN
        form = {"username": name, "password": password, "grant_type": "password"}
        TOKENS[server] = checked(requests.post(f"{server}/auth/token", data=form, timeout=300)).json()["access_token"]
    return {"Authorization": f"bearer {TOKENS[server]}"}


def checked(answer: requests.Response) -> requests.Response:
    """The answer, or the end with the server's sentence."""
    if not answer.ok:
        raise SystemExit(f"{answer.url}: {answer.status_code} {answer.text}")
    return answer


def infer(url: str) -> requests.Response:
    """One inference on a volume of 96 x 96 x 96 voxels."""
    query = {"image": "case_5", "output": "json"}
    return checked(requests.post(f"{url}/infer/segmentation", params=query, headers=headers(url), timeout=300))


def submit(url: str, case: str, label: Path) -> None:
    """Submit a label."""
    with label.open("rb") as file:
        files = {"label": ("label.nii.gz", file)}
        query = {"image": case}
        checked(requests.put(f"{url}/datastore/label", params=query, files=files, headers=headers(url), timeout=300))


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds of a call."""
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def times_of(call: Callable[[], Any], seconds: float) -> list[float]:
    """Milliseconds of each call of a client that asks twenty times a second."""
    end = time.perf_counter() + seconds
    found = []
    while time.perf_counter() < end:
        found.append(timed(call))
        time.sleep(0.05)
    return found


def count_of(call: Callable[[], Any], seconds: float) -> float:
    """How many calls, one after another, fit into the time; the last one counts by its part."""
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
    """Call again and again in a thread; the list grows with each call that ended."""
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
    """Median, 99th percentile and maximum."""
    p99 = statistics.quantiles(values, n=100, method="inclusive")[98]
    return {"p50": statistics.median(values), "p99": p99, "max": max(values), "n": len(values)}


if __name__ == "__main__":
    main()
