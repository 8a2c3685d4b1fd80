"""The README is true: its commands parse, its files exist, its links lead somewhere, and it names every recipe and command."""

import re
import shlex
from pathlib import Path

import pytest

from pipelines import cli
from pipelines.recipe_files import recipe_files

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = (REPOSITORY / "README.md").read_text()


def commands() -> list[str]:
    fenced = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL))
    return [line.split("  #")[0].strip() for line in fenced.splitlines() if "bin/loupe " in line]


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line: str) -> None:
    words = shlex.split(line)[1:]
    _, bound, _ = cli.app.parse_args(words, exit_on_error=False, print_error=False)
    assert bound is not None


def test_there_are_commands_to_parse() -> None:
    assert len(commands()) >= 4


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (REPOSITORY / target).exists(), target


def test_files_in_the_tree_exist() -> None:
    tree = re.search(r"## Where things are\n\n```\n(.*?)```", TEXT, re.DOTALL)
    assert tree is not None
    folder = ""
    for line in tree.group(1).splitlines():
        if not line.startswith(" "):
            folder = line.split()[0]
        for name in re.findall(r"(?<![/\w])(?:[a-z_]+/)*(?:[a-z_]+\.py|[a-z_]+/(?= ))", line):
            assert any((REPOSITORY / place / name).exists() for place in ("", folder)), (folder, name)


def test_every_recipe_is_named() -> None:
    assert [name for name in recipe_files() if name not in TEXT] == []
