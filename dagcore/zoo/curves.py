"""Plots of training losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..files import atomic_write


def draw_losses(path: Path, name: str, log: Sequence[Mapping[str, float]]) -> None:
    """Plot the losses over the samples seen, and write the plot as a PNG.

    Args:
        path: path of the PNG.
        name: name of the network, used as the title.
        log: for each point in order, "samples" and the losses by name.
    """
    figure = Figure(figsize=(6, 4))
    figure.subplots_adjust(left=0.13, right=0.97, bottom=0.13, top=0.92)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    samples = [line["samples"] for line in log]
    keys = [key for key in log[-1] if key != "samples"]
    for key in keys if len(keys) > 2 else ["loss"]:  # a single loss equals the sum
        weight = 2.0 if key == "loss" else 1.0
        label = "sum" if key == "loss" else key.removeprefix("loss_").replace("_", " ")
        axes.plot(samples, [line[key] for line in log], label=label, linewidth=weight)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set(title=name, xlabel="samples", ylabel="loss")
    axes.grid(alpha=0.3)
    if len(keys) > 2:
        axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
