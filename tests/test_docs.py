"""Every snippet of the README and of docs/ runs as it stands, and every command line is one."""

import re
import shlex
from pathlib import Path

import click
import pytest
from sybil.document import Document
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser

from dagcore.cli import group

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MADE = ("docs/benchmarks", "docs/changelog")  # by `make docs`
PAGES = [page for page in PAGES if not str(page.relative_to(ROOT)).startswith(MADE)]


def name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_snippets_run(page, tmp_path, monkeypatch):
    """In a folder of its own, each page in one namespace from top to bottom.

    A line `% invisible-code-block: python` begins what the page does not show.
    """
    monkeypatch.chdir(tmp_path)
    examples = list(Document.parse(str(page), PythonCodeBlockParser(), SkipParser()))
    shown = len(re.findall(r"^```python$", page.read_text(), re.M))
    assert len(examples) >= shown
    for example in examples:
        example.evaluate()


def command_lines(page):
    """The lines in ```sh blocks that call dagcore, comments and line ends taken off."""
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "dagcore" in words:
                yield words[words.index("dagcore") + 1 :]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_command_lines_have_commands_and_options_that_there_are(page):
    for words in command_lines(page):
        command, context = group, click.Context(group)
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            found = command.get_command(context, words[0])
            assert found is not None, f"{name(page)}: no command {words[0]}"
            command, words = found, words[1:]
        known = {"--help", "--version"}.union(
            *((option.opts + option.secondary_opts) for option in command.params)
        )
        used = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert used <= known, f"{name(page)}: no options {used - known}"


def headings(page):
    """The anchors of a page's headings, as GitHub and MyST make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    found = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    """To a file that there is, and to a heading that it has."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        led = page.parent / target if target else page
        assert led.exists(), f"{name(page)} links to {link}"
        if anchor and led.suffix == ".md":
            assert anchor in headings(led), f"{name(page)} links to {link}"
