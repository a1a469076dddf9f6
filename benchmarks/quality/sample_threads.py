"""Speedup by a thread per sample: training steps of `tiny` on two patches, with and without `SampleThreads`.

    OMP_WAIT_POLICY=passive python -m benchmarks.quality.sample_threads [--threads 2]

The variable is the server's setting. Both ways alternate within one run, and the medians of these pairs are compared.
Writes data/sample_threads.json and the section sample_threads of training_speed.md.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

import torch
from benchmarks.common.machine import machine_lines
from benchmarks.common.report import Section, add_results, bullets, markdown_table, measure_and_write
from benchmarks.common.steps import training_step
from benchmarks.common.turns import in_turns

from deformux.fitting.sample_parallel import SampleThreads
from deformux.networks.deformux_net import DeformUXNet

SIZES = ((32, 48, 32), (48, 64, 48), (64, 64, 64))
BATCH = 2


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    add_results(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    measure_and_write(arguments, "sample_threads", lambda: measured(arguments.pairs), section)


def measured(pairs: int) -> dict[str, Any]:
    """Time both ways on all sizes."""
    rows = []
    for size in SIZES:
        network = DeformUXNet(1, 3, "tiny")
        ways = (training_step(way, BATCH, size) for way in (network, SampleThreads(network, BATCH)))
        whole, shared, ratio = in_turns(*ways, pairs)
        rows.append({"size": size, "whole_s": whole, "shared_s": shared, "ratio": ratio})
        print(rows[-1], flush=True)
    policy = os.environ.get("OMP_WAIT_POLICY", "not set")
    return {"rows": rows, "machine": [*machine_lines(), f"OMP_WAIT_POLICY: {policy}"]}


def section(data: Mapping[str, Any]) -> Section:
    """Write the seconds of a training step as a table."""
    rows = [
        ("×".join(map(str, row["size"])), f"{row['whole_s']:.2f}", f"{row['shared_s']:.2f}", f"{row['ratio']:.2f}")
        for row in data["rows"]
    ]
    return Section(
        "training_speed",
        "sample_threads",
        "A thread per sample",
        [
            f"`tiny`, a batch of {BATCH}, seconds of a training step: all threads in each operation, and a thread per",
            "sample (`deformux.fitting.sample_parallel`), in turns; a step is forward, loss, backward and AdamW.",
            "",
            *markdown_table(("voxels", "all in each operation", "a thread per sample", "ratio"), rows),
            *bullets(data["machine"]),
        ],
    )


if __name__ == "__main__":
    main()
