"""Every option is declared once: the command line, ``--conf``, the Makefile and the documents agree with that."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import typer

from deformux.networks.deformux_net import PRESETS
from deformux.networks.pretrained import PRETRAINED
from deformux_label.cli.main import app
from deformux_label.lib.configs.declared_options import (
    LISTEN_OPTIONS,
    PLAIN_OPTIONS,
    PROJECT_OPTIONS,
    SERVE_OPTIONS,
    WEB_OPTIONS,
    Option,
)
from deformux_label.lib.configs.project import OPTIONS, Project
from deformux_label.lib.configs.server import SERVER_OPTIONS, ServerOptions

HEAD = "| option (`make serve`, `deformux-label serve`, `--conf`) | values | default |"


def table() -> list[str]:
    """Return the rows that the documents must have, in the order of the declaration."""
    rows = []
    for option in SERVE_OPTIONS:
        names = [option.variable, option.flag, "" if option in LISTEN_OPTIONS else option.name]
        shown = ", ".join(f"`{name}`" for name in names if name)
        default = f"`{option.default}`" if option.default else option.default_note
        rows.append(f"| {shown} | {option.help} | {default} |")
    return rows


def documents(repository: Path) -> list[Path]:
    return [repository / "README.md", *sorted((repository / "docs").glob("*.md"))]


def test_one_document_has_the_table_of_the_declaration(repository: Path) -> None:
    found = [text for file in documents(repository) if HEAD in (text := file.read_text(encoding="utf-8"))]
    assert len(found) == 1
    lines = found[0].split(HEAD)[1].split("\n\n")[0].strip().splitlines()
    assert lines == ["|---|---|---|", *table()]


def test_the_makefile_hands_on_every_variable(repository: Path) -> None:
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    recipe = makefile.split("\nserve:")[1].split("\n\n")[0]
    handed_on = dict(re.findall(r'\$\(if \$\((\w+)\),(--[a-z-]+) "\$\(\1\)"\)', recipe))
    assert handed_on == {option.variable: option.flag for option in SERVE_OPTIONS if option.variable}
    help_text = makefile.split("\nhelp:")[1].split("\n\n")[0]
    for variable in handed_on:
        assert re.search(rf"\b{variable}\b", help_text), f"`make help` does not name {variable}"


def test_make_help_names_the_document_with_the_table(repository: Path) -> None:
    (named,) = re.findall(r"options: ([\w/.]+\.md)", (repository / "Makefile").read_text(encoding="utf-8"))
    assert HEAD in (repository / named).read_text(encoding="utf-8")


def test_serve_takes_every_option() -> None:
    command = typer.main.get_command(app).commands["serve"]
    parameters = {parameter.name: parameter for parameter in command.params}
    assert list(parameters) == ["studies", *(option.name for option in SERVE_OPTIONS)]
    for option in SERVE_OPTIONS:
        parameter = parameters[option.name]
        assert parameter.opts == [option.flag]
        assert parameter.is_flag == option.is_flag
        assert not parameter.default, "what is not given is left to the declaration"
        assert parameter.help.lower() == option.help.replace("`", "").lower() + "."
        assert parameter.show_default == (option.default or option.default_note.replace("`", ""))


def test_conf_takes_every_option_but_those_of_the_listener() -> None:
    assert set(OPTIONS) == {option.name for option in PROJECT_OPTIONS}
    assert set(SERVER_OPTIONS) == {option.name for option in WEB_OPTIONS}
    assert len({option.name for option in SERVE_OPTIONS}) == len(SERVE_OPTIONS)


@pytest.mark.parametrize("option", [*PLAIN_OPTIONS, *WEB_OPTIONS], ids=lambda option: option.name)
def test_a_plain_option_is_a_field_with_its_default(option: Option[Any]) -> None:
    fields = {field.name: field for field in (*dataclasses.fields(Project), *dataclasses.fields(ServerOptions))}
    assert fields[option.name].default == option.default_value


def test_the_defaults_of_a_model_are_the_declared_ones() -> None:
    project = Project.from_conf({"labels": "liver"})
    assert project == Project(("liver",))
    declared = {option.name: option.default for option in PROJECT_OPTIONS}
    assert project.to_conf() == {**declared, "labels": "liver"}


def test_the_help_names_every_choice() -> None:
    described = {option.name: option.help for option in SERVE_OPTIONS}
    for name, choices in (("preset", PRESETS), ("pretrained", (*PRETRAINED, "none"))):
        assert all(f"`{choice}`" in described[name] for choice in choices)
