"""The results of `benchmarks.operator.deform_conv3d_gpu`: data and a section with targets, kept after every part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.report import (
    Section,
    bullets,
    data_file,
    markdown_table,
    read_data,
    read_section,
    write_data,
    write_section,
)

_NAME, _PAGE = "deform_conv3d_gpu", "operator_gpu"

OURS, IM2COL, GRID, TVDCN = "deform3d", "im2col + GEMM per group", "27 grid_sample", "tvdcn"
COMPILED = ", compiled"
PEERS = (IM2COL, IM2COL + COMPILED, GRID, GRID + COMPILED)
# The size that the targets are for: the network's first stage.
TARGET_SHAPE = (2, 48, 48)


@dataclass(frozen=True)
class Row:
    """One implementation on one stage; times are medians in milliseconds, `training` is forward and backward."""

    implementation: str
    batch: int
    channels: int
    size: int
    dtype: str
    layout: str
    sigma: float
    forward_ms: float
    training_ms: float
    floor_ms: float

    @property
    def case(self) -> tuple[int, int, int, str, str, float]:
        return self.batch, self.channels, self.size, self.dtype, self.layout, self.sigma

    @property
    def shape(self) -> str:
        return f"{self.batch}×{self.channels}×{self.size}³"


@dataclass(frozen=True)
class Target:
    """A target; `measured` is None until its part has run."""

    name: str
    limit: float
    unit: str
    measured: float | None
    at_least: bool = False

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        met = self.measured >= self.limit if self.at_least else self.measured <= self.limit
        return "met" if met else "missed"


@dataclass
class Results:
    """All measurements on one machine so far."""

    folder: Path
    machine: list[str]
    parts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def resume(cls, folder: Path, machine: list[str]) -> Results:
        """Return the results with those of an earlier run on the same machine, with the same versions."""
        if data_file(folder, _NAME).is_file():
            content = read_data(folder, _NAME)
            if _undated(content["machine"]) == _undated(machine):
                return cls(folder, machine, content["parts"])
        return cls(folder, machine)

    def keep(self, part: str, content: Any) -> None:
        """Add a part; write the data and the section."""
        self.parts[part] = content
        kept = {"machine": self.machine, "targets": [asdict(t) for t in targets(self.parts)], "parts": self.parts}
        write_data(self.folder, _NAME, kept)
        write_section(self.folder, section(self.machine, self.parts))

    @classmethod
    def rewrite(cls, folder: Path) -> None:
        """Write the section again from the data."""
        content = read_data(folder, _NAME)
        write_section(folder, section(content["machine"], content["parts"]))

    def text(self) -> str:
        """Return the section as it was written last."""
        return read_section(self.folder, _PAGE, _NAME)


def _undated(machine: Sequence[str]) -> list[str]:
    return [line for line in machine if not line.startswith(("date:", "threads:"))]


def rows_of(parts: Mapping[str, Any], *names: str) -> list[Row]:
    return [Row(**row) for name in names for row in parts.get(name, [])]


def _find(rows: Sequence[Row], implementation: str, dtype: str, sigma: float = 1.0) -> Row | None:
    for row in rows:
        here = (row.batch, row.channels, row.size) == TARGET_SHAPE and row.layout in ("channels-last", "")
        if here and (row.implementation, row.dtype, row.sigma) == (implementation, dtype, sigma):
            return row
    return None


def _speedup(ours: Row | None, peers: Sequence[Row | None], attribute: str) -> float | None:
    """Return the ratio to the fastest peer that has been measured."""
    times = [getattr(peer, attribute) for peer in peers if peer is not None]
    return min(times) / getattr(ours, attribute) if ours is not None and times else None


def targets(parts: Mapping[str, Any]) -> list[Target]:
    """Return the targets, at N=2, C=48, 48³, channels-last and offsets of deviation 1 unless stated otherwise."""
    operator, peers = rows_of(parts, "operator"), rows_of(parts, "peers", "compiled-peers")
    slow = rows_of(parts, "deterministic")
    found = []
    for dtype, limit in (("float32", 0.44), ("bfloat16", 0.30)):
        ours = _find(operator, OURS, dtype)
        found.append(Target(f"forward, {dtype}", limit, "ms", ours and ours.forward_ms))
    ours = _find(operator, OURS, "float32")
    found.append(Target("forward + backward, float32", 1.6, "ms", ours and ours.training_ms))
    for dtype in ("float32", "bfloat16"):
        ours, careful = _find(operator, OURS, dtype), _find(slow, OURS, dtype)
        columns = [_find(peers, IM2COL + end, dtype) for end in ("", COMPILED)]
        samples = [_find(peers, GRID + end, dtype) for end in ("", COMPILED)]
        times = f"{dtype}, times faster than the best of"
        found += [
            Target(f"forward, {times} {IM2COL}", 10, "×", _speedup(ours, columns, "forward_ms"), True),
            Target(f"forward, {times} {GRID}", 8, "×", _speedup(ours, samples, "forward_ms"), True),
            Target(f"forward + backward, {times} {IM2COL}", 6, "×", _speedup(ours, columns, "training_ms"), True),
        ]
        for sigma in (1.0, 0.3):
            row = _find(operator, OURS, dtype, sigma)
            ratio = row and row.training_ms / row.forward_ms
            found.append(Target(f"forward + backward over forward, {dtype}, offsets of {sigma:g}", 3.5, "×", ratio))
        ratio = careful.training_ms / ours.training_ms if ours and careful else None
        found.append(Target(f"deterministic forward + backward over the default, {dtype}", 3, "×", ratio))
    network = [row for row in parts.get("network", {}).get("rows", []) if not row["checkpointing"]]
    share = network[0]["share"] if network else None
    found += [
        Target("training step of the base network: operator", 15, "%", None if share is None else 100 * share),
        Target("training step of the base network: peak memory", 20, "GB", network[0]["peak_gb"] if network else None),
    ]
    return found


def section(machine: Sequence[str], parts: Mapping[str, Any]) -> Section:
    """Write all parts measured so far."""
    text = [*bullets(machine), "", "### Targets", ""]
    text += markdown_table(
        ("at 2×48×48³", "target", "measured", ""),
        [
            (
                target.name,
                f"{'≥' if target.at_least else '≤'} {target.limit:g} {target.unit}",
                "" if target.measured is None else f"{target.measured:.3g} {target.unit}",
                target.verdict,
            )
            for target in targets(parts)
        ],
    )
    text += _operator(rows_of(parts, "operator"), "Operator")
    text += _operator(rows_of(parts, "deterministic"), "With `torch.use_deterministic_algorithms(True)`")
    tvdcn = parts.get("tvdcn", {})
    peers = [*rows_of(parts, "peers", "compiled-peers"), *rows_of(tvdcn, "rows")]
    text += _against(rows_of(parts, "operator"), peers, tvdcn.get("skipped"))
    if "fused" in parts:
        text += ["### Offsets computed inside the kernel, against convolution then operator", ""]
        text += markdown_table(
            ("input", "dtype", "two steps ms", "fused ms", "ratio", "two steps peak MB", "fused peak MB"),
            [
                (
                    *(row["shape"], row["dtype"], f"{row['both_ms']:.3f}", f"{row['fused_ms']:.3f}"),
                    *(f"{row['both_ms'] / row['fused_ms']:.2f}", f"{row['both_mb']:.1f}", f"{row['fused_mb']:.1f}"),
                )
                for row in parts["fused"]
            ],
        )
    if "network" in parts:
        text += _network(parts["network"])
    for title, kernels in parts.get("kernels", {}).items():
        text += [f"### What runs on the GPU: {title}", ""]
        lines = [(f"`{k['kernel'][:100]}`", f"{k['calls']:g}", f"{k['us']:.1f}") for k in kernels]
        text += markdown_table(("kernel", "calls", "µs"), lines)
    for title, tuned in parts.get("tuning", {}).items():
        text += [f"### Launch shapes: {title}", ""]
        text += markdown_table(
            ("launch shape", "time over the default's"), [(t["tuning"], f"{t['ratio']:.3f}") for t in tuned]
        )
    return Section(_PAGE, _NAME, "Depthwise convolution on a GPU", text)


def _operator(rows: Sequence[Row], title: str) -> list[str]:
    if not rows:
        return []
    lines = [
        (
            *(row.shape, row.dtype, row.layout, f"{row.sigma:g}", f"{row.forward_ms:.3f}", f"{row.floor_ms:.3f}"),
            *(f"{row.forward_ms / row.floor_ms:.2f}", f"{row.training_ms:.3f}"),
            f"{row.training_ms / row.forward_ms:.1f}",
        )
        for row in rows
    ]
    head = ("input", "dtype", "layout", "offsets", "forward ms", "L1 floor ms", "forward / floor")
    return [f"### {title}", "", *markdown_table((*head, "forward + backward ms", "/ forward"), lines)]


def _against(operator: Sequence[Row], peers: Sequence[Row], skipped: str | None) -> list[str]:
    """Compare peers on contiguous tensors with the operator on the network's channels-last ones."""
    if not peers and skipped is None:
        return []
    ours = {row.case: row for row in operator}
    lines = []
    for peer in peers:
        mine = ours.get((*peer.case[:4], "channels-last", peer.sigma))
        ratios = (
            ("", "")
            if mine is None
            else (f"{peer.forward_ms / mine.forward_ms:.1f}×", f"{peer.training_ms / mine.training_ms:.1f}×")
        )
        times = f"{peer.forward_ms:.3f}", ratios[0], f"{peer.training_ms:.3f}", ratios[1]
        lines.append((peer.shape, peer.dtype, peer.implementation, *times))
    head = ("input", "dtype", "implementation", "forward ms", "over ours", "forward + backward ms", "over ours")
    note = [] if skipped is None else [f"Not measured: {skipped}.", ""]
    return ["### Against other implementations", "", *markdown_table(head, lines), *note]


def _network(part: Mapping[str, Any]) -> list[str]:
    title = ["### Training step of the base network", ""]
    if "skipped" in part:
        return [*title, part["skipped"], ""]
    lines = [
        (
            *("on" if row["checkpointing"] else "off", f"{row['ms']:.1f}", f"{row['peak_gb']:.2f}"),
            *(f"{row['operator_ms']:.1f}", "" if row["share"] is None else f"{100 * row['share']:.1f} %"),
        )
        for row in part["rows"]
    ]
    head = ("activation checkpointing", "step ms", "peak memory GB", "operator ms", "operator's share of GPU time")
    return [*title, part["what"], "", *markdown_table(head, lines)]
