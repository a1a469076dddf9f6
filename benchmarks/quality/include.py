"""Put results of commands outside the benchmarks into a page: those of ``deformux clicks`` or ``make demo``.

    python -m benchmarks.quality.include --page clicks --name clicks_hippocampus --title "Clicks on hippocampi" \\
        results/summary.md --data results/per_case.csv --picture results/clicks.png

The Markdown becomes the section, to be completed by hand with the machine and the settings; the data file becomes
data/<name>.csv, the picture <name>.png.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from benchmarks.common.places import RESULTS
from benchmarks.common.report import PAGES, Section, write_section

from deformux.data.atomic_files import replacing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="Markdown without the heading of the section")
    parser.add_argument("--page", choices=tuple(PAGES), required=True)
    parser.add_argument("--name", required=True, help="name of the section, its data file and its picture")
    parser.add_argument("--title", required=True, help="heading of the section")
    parser.add_argument("--data", type=Path, help="CSV file")
    parser.add_argument("--picture", type=Path, help="PNG file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of pages, pictures and data files")
    arguments = parser.parse_args()
    lines = arguments.text.read_text().strip().splitlines()
    if arguments.picture:
        lines += ["", f"![{arguments.title}]({arguments.name}.png)"]
        copy(arguments.picture, arguments.results / f"{arguments.name}.png")
    if arguments.data:
        copy(arguments.data, arguments.results / "data" / f"{arguments.name}.csv")
    write_section(arguments.results, Section(arguments.page, arguments.name, arguments.title, lines))


def copy(source: Path, target: Path) -> None:
    """Copy a file by rename."""
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


if __name__ == "__main__":
    main()
