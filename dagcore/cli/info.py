"""The command `dagcore info`."""

from __future__ import annotations

import click

from .. import info

EXAMPLES = """
\b
Examples:
  dagcore info
  dagcore info --require-cuda-kernels
"""


@click.command("info", epilog=EXAMPLES)
@click.option(
    "--require-cuda-kernels",
    is_flag=True,
    help="Exit with status 1 unless every op has a CUDA kernel.",
)
def command(require_cuda_kernels: bool) -> int:
    """Show versions, native kernels and devices."""
    return info.show(require_cuda_kernels)
