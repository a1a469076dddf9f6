"""What a thread per sample saves: training steps of `tiny` on two patches, with and without `SampleThreads`.

``OMP_WAIT_POLICY=passive python -m benchmarks.quality.sample_threads [--threads 2]``, with the server's setting, writes
``results/sample_threads.md`` and ``results/sample_threads.json``. Both ways alternate within one run, and the medians
of these pairs are compared.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from benchmarks.common.machine import machine_lines
from benchmarks.common.turns import in_turns
from convolution import training_step

from deformux.data.atomic_files import write_text
from deformux.fitting.sample_parallel import SampleThreads
from deformux.networks.deformux_net import DeformUXNet

RESULTS = Path(__file__).parents[1] / "results"
SIZES = ((32, 48, 32), (48, 64, 48), (64, 64, 64))
BATCH = 2


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for size in SIZES:
        rows.append({"size": size, **_compare(size, arguments.pairs)})
        print(rows[-1], flush=True)
    lines = [
        "# A thread per sample",
        "",
        f"`tiny`, a batch of {BATCH}, seconds of a training step: all threads in each operation, against a thread per",
        "sample (`deformux.fitting.sample_parallel`), in turns; a step is forward, loss, backward and AdamW.",
        "",
        "| voxels | all in each operation | a thread per sample | ratio |",
        "|---|---|---|---|",
        *(
            f"| {'×'.join(map(str, row['size']))} | {row['whole_s']:.2f} | {row['shared_s']:.2f} | {row['ratio']:.2f} |"
            for row in rows
        ),
        "",
        *(f"- {line}" for line in machine_lines()),
        f"- OMP_WAIT_POLICY: {os.environ.get('OMP_WAIT_POLICY', 'not set')}",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    write_text(RESULTS / "sample_threads.md", text)
    write_text(RESULTS / "sample_threads.json", json.dumps({"rows": rows, "machine": machine_lines()}, indent=1) + "\n")


def _compare(size: tuple[int, ...], pairs: int) -> dict[str, float]:
    network = DeformUXNet(1, 3, "tiny")
    ways = (training_step(way, BATCH, size) for way in (network, SampleThreads(network, BATCH)))
    whole, shared, ratio = in_turns(*ways, pairs)
    return {"whole_s": whole, "shared_s": shared, "ratio": ratio}


if __name__ == "__main__":
    main()
