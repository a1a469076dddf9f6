"""The measured numbers of README and docs are in the pages that they link, and every link leads somewhere."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent
_DOCUMENTS = ["README.md", "CHANGELOG.md", *sorted(f"docs/{path.name}" for path in (_ROOT / "docs").glob("*.md"))]
# Not those of pictures.
_RESULTS = re.compile(r"\]\((?:\.\./)?(benchmarks/results/[\w./]+\.(?:md|csv|json))\)")
# Not the digits of names such as 96³, T1 or v0001; thousands may be separated.
_NUMBER = re.compile(r"(?<![\w.×])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?![\d.]*[\w³])")
_UNITS = re.compile(r"(?<=\d)(×|%|\sms|\ss\b|\sGB|\sMB)")
_SECTION = re.compile(r"<!-- begin (\w[\w.]*) -->\n(.*?)<!-- end \1 -->", re.DOTALL)
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
_LINK = re.compile(r"\]\(([^()\s]+)\)|<img[^>]* src=\"([^\"]+)\"")


@dataclass(frozen=True)
class Claim:
    """A sentence or table cells that hold results, and the file that they name."""

    text: str
    file: str


def numbers(text: str) -> list[Decimal]:
    return [Decimal(found.replace(",", "")) for found in _NUMBER.findall(_UNITS.sub(" ", text))]


def claims(text: str) -> list[Claim]:
    """Return sentences and rows that link results, and rows below a sentence that links results and ends with ":"."""
    found: list[Claim] = []
    last = caption = ""
    for line in re.split(r"\n(?=\||- |\n)", text):
        link = _RESULTS.search(line)
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.strip().startswith("|") else []
        if link is not None:
            last = link[1]
        if not cells:
            if line.strip():
                caption = last if link is not None and line.strip().endswith(":") else ""
            if link is not None:
                found.append(Claim(line.replace(link[0], ""), last))
        elif link is not None or cells[-1] == "same":
            found.append(Claim(cells[1], last))
        elif caption:
            found.append(Claim(" | ".join(cells[1:]), caption))
    return found


def sections(text: str) -> list[str]:
    """Return the sections of a page, or the whole file if it has none."""
    return [body for _, body in _SECTION.findall(text)] or [text]


def is_in(value: Decimal, results: list[Decimal]) -> bool:
    """Check whether a value is one of the results, rounded to the value's digits."""
    half = Decimal("0.5").scaleb(int(value.as_tuple().exponent))
    return any(abs(abs(result) - abs(value)) <= half for result in results)


def missing(claim: Claim, repository: Path) -> list[Decimal]:
    """Return the numbers of a claim that are not in the one section of its file that holds most of them."""
    results = [numbers(section) for section in sections((repository / claim.file).read_text())]
    return min(([v for v in numbers(claim.text) if not is_in(v, section)] for section in results), key=len)


@pytest.mark.parametrize("name", _DOCUMENTS)
def test_measured_numbers_are_in_the_files_that_are_linked(name: str, repository: Path) -> None:
    wrong = []
    for claim in claims((repository / name).read_text()):
        wrong += [f"{claim.file} has no {value}: {claim.text}" for value in missing(claim, repository)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["README.md", "docs/results.md"])
def test_a_wrong_number_is_found(name: str, repository: Path) -> None:
    """Run the check itself with one number changed at a time in every claim."""
    found = [claim for claim in claims((repository / name).read_text()) if numbers(claim.text)]
    assert len(found) >= {"README.md": 5, "docs/results.md": 25}[name]
    unnoticed = checked = 0
    for claim in found:
        for match in re.finditer(r"\d\.\d{3,}", claim.text):
            wrong = Decimal(match[0]) + Decimal("3.0517")
            checked += 1
            text = claim.text[: match.start()] + str(wrong) + claim.text[match.end() :]
            unnoticed += not missing(Claim(text, claim.file), repository)
    assert checked >= {"README.md": 5, "docs/results.md": 50}[name]
    assert unnoticed == 0


def test_numbers_of_two_sections_are_no_claim(tmp_path: Path) -> None:
    page = "".join(f"<!-- begin s{n} -->\n0.{n}\n<!-- end s{n} -->\n" for n in (1, 2))
    (tmp_path / "page.md").write_text(page)
    assert missing(Claim("0.1", "page.md"), tmp_path) == missing(Claim("0.2", "page.md"), tmp_path) == []
    assert missing(Claim("0.1 and 0.2", "page.md"), tmp_path) == [Decimal("0.2")]


def test_rows_below_a_linked_sentence_are_claims() -> None:
    page = "benchmarks/results/x.md"
    text = f"Dice ([x]({page})):\n\n| a | b | c |\n|---|---|---|\n| 1 | 0.5 | 0.7 |\n\nOther.\n\n| 2 | 0.9 |\n"
    assert [numbers(claim.text) for claim in claims(text) if numbers(claim.text)] == [[Decimal("0.5"), Decimal("0.7")]]


def tracked_documents() -> list[str]:
    done = subprocess.run(["git", "ls-files", "*.md"], cwd=_ROOT, capture_output=True, text=True, check=False)
    return done.stdout.split()


def slug(heading: str) -> str:
    """Return the fragment by which GitHub links a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("name", tracked_documents())
def test_relative_links_lead_somewhere(name: str, repository: Path) -> None:
    text = _CODE.sub("", (repository / name).read_text())
    broken = []
    for target in (one or other for one, other in _LINK.findall(text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        file = (repository / name).parent / path if path else repository / name
        if not file.exists():
            broken.append(target)
        elif fragment and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            broken += [] if fragment in map(slug, headings) else [target]
    assert not broken, f"{name} links what is not there: {', '.join(broken)}"
