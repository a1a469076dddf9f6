"""Result pages of several sections, and the data file behind each section.

``<page>.md`` holds the sections of related benchmarks. Each command replaces its own section, which comment lines
enclose, and leaves the others as they are. What a section is written from is in ``data/<benchmark>.json``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from benchmarks.common.places import RESULTS
from filelock import FileLock
from tabulate import tabulate

from deformux.data.atomic_files import replacing, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "PAGES",
    "Section",
    "add_results",
    "add_rewrite",
    "bullets",
    "data_file",
    "markdown_table",
    "measure_and_write",
    "read_data",
    "read_section",
    "rounded",
    "write_data",
    "write_section",
]

PAGES: Mapping[str, str] = MappingProxyType(
    {
        "operator_cpu": "The operator on a CPU",
        "operator_gpu": "The operator on a GPU",
        "training_speed": "Speed of training",
        "inference": "Speed of inference",
        "clicks_speed": "Speed of clicks",
        "server": "The server under load",
        "scribbles": "Scribbles",
        "comparison": "DeformUX-Net and other networks",
        "ablations": "The paper's ablations",
        "few_labels": "Few labelled volumes",
        "active_learning": "Choosing the next case",
        "clicks": "What clicks gain",
        "learning": "The learning loop",
        "models": "The strongest models",
        "any_organ": "Any organ with default settings",
        "planner": "The plan beside nnU-Net's",
        "plan_trials": "Trials behind the plan",
    }
)


@dataclass(frozen=True)
class Section:
    """One section of a page.

    Args:
        page: a key of ``PAGES``.
        name: names the section in its page, and its picture.
        title: the heading.
        lines: Markdown below the heading; headings in it begin with ``###``.
        plot: saved as ``<name>.png`` and shown at the end of the section.
    """

    page: str
    name: str
    title: str
    lines: Sequence[str]
    plot: Figure | None = None


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a Markdown table and an empty line."""
    cells = [[str(cell) for cell in row] for row in rows]
    # Without alignment tabulate pads no cells, which would change every line of a table with its longest cell.
    text = tabulate(cells, heads, tablefmt="github", disable_numparse=True, stralign=None, numalign=None)
    return [*text.splitlines(), ""]


def bullets(facts: Iterable[str]) -> list[str]:
    """Return a Markdown list."""
    return [f"- {fact}" for fact in facts]


def add_results(parser: argparse.ArgumentParser) -> None:
    """Add ``--results`` and ``--rewrite`` to a command."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of pages, pictures and data files")
    add_rewrite(parser)


def add_rewrite(parser: argparse.ArgumentParser) -> None:
    """Add ``--rewrite`` to a command."""
    parser.add_argument(
        "--rewrite", action="store_true", help="measure nothing: write the section again from the data file"
    )


def measure_and_write(
    arguments: argparse.Namespace,
    name: str,
    measure: Callable[[], Mapping[str, Any] | Iterator[Mapping[str, Any]]],
    section: Callable[[Mapping[str, Any]], Section],
) -> None:
    """Measure, keep the data, write the section and print it; with ``--rewrite`` take the data from the file.

    ``measure`` returns all data, or yields what it has so far each time that there is more.
    """
    measured = [None] if arguments.rewrite else measure()
    for data in [measured] if isinstance(measured, Mapping) else measured:
        if data is not None:
            write_data(arguments.results, name, data)
        # From the file also after a measurement, so that --rewrite gives the same section.
        written = section(read_data(arguments.results, name))
        write_section(arguments.results, written)
    print(read_section(arguments.results, written.page, written.name))


def data_file(results: Path, name: str) -> Path:
    """Return the path of a benchmark's data file."""
    return results / "data" / f"{name}.json"


def read_data(results: Path, name: str) -> dict[str, Any]:
    """Read a benchmark's data file."""
    content: dict[str, Any] = json.loads(data_file(results, name).read_text(encoding="utf-8"))
    return content


def write_data(results: Path, name: str, data: Mapping[str, Any]) -> None:
    """Replace a benchmark's data file: one line for each entry of its top level, and for each row of a list there."""
    entries = []
    for key, value in data.items():
        text = _json(value)
        if isinstance(value, list) and len(text) > 120:
            text = "[\n" + ",\n".join(_json(row) for row in value) + "\n]"
        elif isinstance(value, dict) and len(text) > 120:
            text = "{\n" + ",\n".join(f"{_json(k)}: {_json(row)}" for k, row in value.items()) + "\n}"
        entries.append(f"{_json(key)}: {text}")
    write_text(data_file(results, name), "{\n" + ",\n".join(entries) + "\n}\n")


def rounded(value: Any) -> Any:
    """Round all numbers of nested lists and dicts to seven digits, those of float32, in which scores are computed."""
    if isinstance(value, Mapping):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [rounded(each) for each in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def write_section(results: Path, section: Section) -> None:
    """Replace a section of its page by rename, or add it at the end; other sections stay as they are."""
    lines = ["", f"## {section.title}", "", *section.lines]
    if section.plot is not None:
        with replacing(results / f"{section.name}.png") as temporary:
            section.plot.savefig(temporary, format="png")
        lines += ["", f"![{section.title}]({section.name}.png)"]
    body = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    begin, end = _markers(section.name)
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{section.page}.md"
    with FileLock(results / "pages.lock"):
        page = path.read_text(encoding="utf-8") if path.is_file() else f"# {PAGES[section.page]}\n"
        block = f"{begin}\n{body}\n{end}\n"
        if begin in page:
            before, _, rest = page.partition(begin)
            page = before + block + rest.partition(f"{end}\n")[2]
        else:
            page = f"{page}\n{block}"
        write_text(path, page)


def read_section(results: Path, page: str, name: str) -> str:
    """Return the Markdown of one section, its heading first."""
    begin, end = _markers(name)
    text = (results / f"{page}.md").read_text(encoding="utf-8")
    return text.partition(f"{begin}\n")[2].partition(end)[0]


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- begin {name} -->", f"<!-- end {name} -->"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
