"""The sections of server.md, from the data of ``benchmarks.server.load``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.common.report import Section, bullets, markdown_table

__all__ = ["section"]


def section(name: str, result: Mapping[str, Any]) -> Section:
    """Write the times as tables."""
    limits = result["limits"]
    by_leases = result["next_sample_ms"]
    few, many = by_leases
    leases, slowest = max(
        ((number, name) for number, values in by_leases.items() for name in values),
        key=lambda place: by_leases[place[0]][place[1]]["p99"],
    )
    worst = by_leases[leases][slowest]
    rows = [
        ("`GET /info/`, server idle, p99", f"{result['info_idle_ms']['p99']:.0f} ms", ""),
        (
            "`GET /info/` during an inference and a training, p99",
            f"**{result['info_busy_ms']['p99']:.0f} ms** (p50 {result['info_busy_ms']['p50']:.0f}, "
            f"max {result['info_busy_ms']['max']:.0f}, {result['info_busy_ms']['n']} requests)",
            f"{limits['info_p99_ms']} ms",
        ),
        (
            f"Next Sample of {result['studies']} studies, slowest strategy ({slowest}, {leases} leases), p99",
            f"**{worst['p99']:.0f} ms** (p50 {worst['p50']:.0f})",
            f"{limits['next_sample_p99_ms']} ms",
        ),
        (
            f"`GET /info/` with {result['studies']} studies, p99",
            f"**{result['info_many_ms']['p99']:.0f} ms** (p50 {result['info_many_ms']['p50']:.0f})",
            f"{limits['info_p99_ms']} ms",
        ),
        (
            f"start with {result['studies']} studies, to the first answer",
            f"**{result['start_s']:.1f} s** ({result['start_fresh_s']:.1f} s without an index)",
            f"{limits['start_s']} s",
        ),
        (
            "publishing a version: extra time of its first inference, worst of 5",
            f"**{result['publish_s']:.2f} s**",
            f"{limits['publish_s']} s",
        ),
        (
            "inferences a minute during a CPU training, of those without",
            f"**{100 * result['throughput_share']:.0f} %** ({result['inferences_per_minute_training']:.0f} of "
            f"{result['inferences_per_minute_idle']:.0f})",
            f"{100 * limits['throughput_share']:.0f} %",
        ),
    ]
    quantiles = ("p50", "p99")
    by_strategy = [
        (name, *(f"{by_leases[number][name][q]:.0f} ms" for number in (few, many) for q in quantiles))
        for name in by_leases[few]
    ]
    lines = [
        "Real servers (`deformux-label serve`) and real requests on one machine; preset `tiny`, windows of 48³ voxels,",
        "a scan of 96³. MONAI Label's own server answered `GET /info/` in 4,320 ms during an inference of 4.35 s.",
        "",
        *markdown_table(("what", "measured", "target"), rows),
        f"Next Sample of {result['studies']} studies by strategy, while others hold a number of leases; the strategies",
        "take turns at random, and each lease is ended before the next is asked for. "
        + ("The login is on." if result["login"] else "The login is off."),
        "",
        *markdown_table(("strategy", f"{few} leases: p50", "p99", f"{many} leases: p50", "p99"), by_strategy),
        *bullets(result["machine"]),
    ]
    title = "The server while it works" + (", with the login on" if result["login"] else "")
    return Section("server", name, title, lines)
