"""`dagcore info`."""

from __future__ import annotations

import click

from .. import info


@click.command("info")
@click.option(
    "--require-cuda-kernels",
    is_flag=True,
    help="Exit with status 1 unless every op has its CUDA kernel.",
)
def command(require_cuda_kernels: bool) -> int:
    """Show versions, native kernels and devices."""
    return info.show(require_cuda_kernels)
