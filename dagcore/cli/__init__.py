"""The command line: the group of all commands, and how their errors are reported."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from ..errors import ArgumentError, ArgumentTypeError
from ..version import __version__

# The module `dagcore.cli.NAME` defines the command NAME. It is imported when the command is used.
COMMANDS = {
    "Attacks": {
        "attack": "Attack one or more images.",
        "run": "Attack a data set, in one process or many.",
        "evaluate": "Measure worst-case robustness under a named protocol.",
        "demo": "Attack sample photographs and a scene, and explain the results.",
    },
    "Networks and experiments": {
        "zoo": "List, train and evaluate the zoo's networks.",
        "paper": "Reproduce the paper's tables and figures.",
    },
    "This machine": {
        "bench": "Time the ops and the updates of attacks on a network.",
        "info": "Show versions, native kernels and devices.",
    },
}

USER_ERRORS = (ArgumentError, ArgumentTypeError, OSError, ImportError)

EXAMPLES = """
\b
Examples:
  dagcore demo
  dagcore attack photo.png --model fcn_resnet50 --out attacked
  dagcore evaluate --data scenes --images 20 --model DL-VGG --epsilon 1/255 --out results

\b
Shell completion, in the start-up file of your shell:
  bash: eval "$(_DAGCORE_COMPLETE=bash_source dagcore)"
  zsh:  eval "$(_DAGCORE_COMPLETE=zsh_source dagcore)"
  fish: _DAGCORE_COMPLETE=fish_source dagcore | source

'dagcore COMMAND --help' shows the options and examples of a command.
"""


class Commands(click.Group):
    """The commands of `COMMANDS`, each imported on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all names, in the order of the help text."""
        return [name for commands in COMMANDS.values() for name in commands]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command; return None if there is none of that name."""
        if cmd_name not in self.list_commands(ctx):
            return None
        found: click.Command = importlib.import_module(f".{cmd_name}", __name__).command
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, grouped by purpose and aligned across the groups."""
        width = max(map(len, self.list_commands(ctx)))
        for title, commands in COMMANDS.items():
            with formatter.section(title):
                formatter.write_dl([(f"{name:{width}}", told) for name, told in commands.items()])


@click.group(
    cls=Commands,
    epilog=EXAMPLES,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    },
)
@click.option(
    "--traceback",
    is_flag=True,
    expose_value=False,
    help="Show the full traceback of an error. May also follow the command's name, or be set "
    "by DAGCORE_TRACEBACK=1 in the environment.",
)
@click.version_option(__version__, prog_name="dagcore")
def group() -> None:
    """Dense Adversary Generation: adversarial examples for segmentation and detection."""


def main(argv: Sequence[str]) -> int:
    """Run a command line and return its exit status.

    A user error prints one line on stderr and returns 2. An internal error prints one line and
    returns 1. On request the traceback is printed before that line.
    """
    arguments = [argument for argument in argv if argument != "--traceback"]
    told_whole = len(arguments) < len(argv) or os.environ.get("DAGCORE_TRACEBACK", "0") != "0"
    names = [name for name in arguments[:1] if any(name in found for found in COMMANDS.values())]
    program = " ".join(["dagcore", *names])
    with _warnings_in_lines(program):
        return _run(arguments, program, told_whole)


@contextlib.contextmanager
def _warnings_in_lines(program: str) -> Iterator[None]:
    """Print the package's own warnings in one line each, like its errors, and without repeats."""
    show, told, package = warnings.showwarning, set[str](), str(Path(__file__).parent.parent)

    def line(message: Any, category: type[Warning], filename: str, *rest: Any, **more: Any) -> None:
        text = " ".join(str(message).split())
        if category is not RuntimeWarning or not filename.startswith(package):
            show(message, category, filename, *rest, **more)
        elif text not in told:
            told.add(text)
            print(f"{program}: warning: {text}", file=sys.stderr)

    warnings.showwarning = line
    try:
        yield
    finally:
        warnings.showwarning = show


def _run(arguments: list[str], program: str, told_whole: bool) -> int:
    """Run a command line, report its error if there is one, and return its exit status."""
    try:
        status = group.main(arguments or ["--help"], prog_name="dagcore", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except Exception as error:
        if isinstance(error, click.Abort):  # click raises it for KeyboardInterrupt and EOFError
            if not isinstance(error.__cause__, EOFError):
                print(f"{program}: interrupted", file=sys.stderr)
                return 130
            error = error.__cause__
        if told_whole:
            traceback.print_exception(error)
        if isinstance(error, click.ClickException):
            status, message = 2, f"error: {error.format_message()}"
        elif isinstance(error, ModuleNotFoundError) and error.name is not None:
            status, message = 2, f'error: {error.name} is missing: pip install "dagcore[cli]"'
        elif isinstance(error, USER_ERRORS):
            status, message = 2, f"error: {error}"
        else:
            hint = "" if told_whole else " (run again with --traceback for the full traceback)"
            status, message = 1, f"internal error: {type(error).__name__}: {error}{hint}"
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    return status
