"""README stays a page: what a reader needs beyond it has a document of its own."""

from pathlib import Path


def test_the_readme_is_under_700_words(repository: Path) -> None:
    assert len((repository / "README.md").read_text().split()) < 700
