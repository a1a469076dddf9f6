"""The page ``results/server.md``, of what ``server.py`` measured."""

from __future__ import annotations

from typing import Any

__all__ = ["table"]


def table(result: dict[str, Any]) -> str:
    """The results as a page."""
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
            "publishing a version: what its first inference takes more, worst of 5",
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
    lines = [
        "# The server while it works",
        "",
        "Real servers (`deformux-label serve`) and real requests on one machine; preset `tiny`, windows of 48³ voxels,",
        "a scan of 96³. MONAI Label's own server answered `GET /info/` in 4,320 ms during an inference of 4.35 s.",
        "",
        "| what | measured | target |",
        "|---|---|---|",
        *[f"| {what} | {measured} | {target} |" for what, measured, target in rows],
        "",
        f"Next Sample of {result['studies']} studies by strategy, while others hold as many leases; the strategies",
        "take turns at random, and each lease is ended before the next is asked for. "
        + ("The login is on." if result["login"] else "The login is off."),
        "",
        f"| strategy | {few} leases: p50 | p99 | {many} leases: p50 | p99 |",
        "|---|---|---|---|---|",
        *[
            f"| {name} | "
            + " | ".join(f"{by_leases[n][name][q]:.0f} ms" for n in (few, many) for q in ("p50", "p99"))
            + " |"
            for name in by_leases[few]
        ],
        "",
        *[f"- {line}" for line in result["machine"]],
        "",
    ]
    return "\n".join(lines)
