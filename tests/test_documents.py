"""What README and docs say was measured, against the files that they name."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent
_DOCUMENTS = ["README.md", "CHANGELOG.md", *sorted(f"docs/{path.name}" for path in (_ROOT / "docs").glob("*.md"))]
# Not those of pictures.
_LINK = re.compile(r"\]\((?:\.\./)?(benchmarks/results/[\w.]+\.(?:md|csv|json))\)")
# Not the digits of names such as 96³, T1 or v0001; thousands may be separated.
_NUMBER = re.compile(r"(?<![\w.×])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?![\d.]*[\w³])")
_UNITS = re.compile(r"(?<=\d)(×|%|\sms|\ss\b|\sGB|\sMB)")


def numbers(text: str) -> list[Decimal]:
    return [Decimal(found.replace(",", "")) for found in _NUMBER.findall(_UNITS.sub(" ", text))]


def claims(text: str) -> list[tuple[str, str]]:
    """Sentences and table cells that hold results, each with the file that it names."""
    found: list[tuple[str, str]] = []
    last = ""
    for line in re.split(r"\n(?=\||- |\n)", text):
        link = _LINK.search(line)
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.strip().startswith("|") else []
        if link is not None:
            last = link[1]
        elif not cells or cells[-1] != "same":
            continue
        found.append((cells[1] if cells else line.replace(link[0] if link else "", ""), last))
    return found


def is_in(value: Decimal, results: list[Decimal]) -> bool:
    """Whether a value is one of the results, as rounded as it is."""
    half = Decimal("0.5").scaleb(int(value.as_tuple().exponent))
    return any(abs(abs(result) - abs(value)) <= half for result in results)


@pytest.mark.parametrize("name", _DOCUMENTS)
def test_measured_numbers_are_in_the_files_they_are_said_to_be_in(name: str, repository: Path) -> None:
    wrong = []
    for text, file in claims((repository / name).read_text()):
        results = numbers((repository / file).read_text())
        wrong += [f"{file} has no {value}: {text}" for value in numbers(text) if not is_in(value, results)]
    assert not wrong, "\n".join(wrong)


def test_a_wrong_number_is_found(repository: Path) -> None:
    """The check itself, on the README with one digit changed."""
    text = (repository / "README.md").read_text()
    assert len(claims(text)) >= 12
    (text, file), *_ = [claim for claim in claims(text) if "hippocampus.md" in claim[1]]
    results = numbers((repository / file).read_text())
    (value,) = numbers(text)
    assert is_in(value, results)
    assert not is_in(value + Decimal("0.051"), results)
