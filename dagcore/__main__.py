"""The `dagcore` command, also run by `python -m dagcore`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (sys.argv if None), and return the exit status."""
    try:
        from . import cli
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("dagcore"):
            raise
        print(f'dagcore: {error.name} is missing: pip install "dagcore[cli]"', file=sys.stderr)
        return 2
    return cli.main(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
