"""The paper's figures of an attack: image, what is seen, perturbation, what is seen after it."""

from __future__ import annotations

import colorsys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ..files import atomic_write

Colours = npt.NDArray[np.uint8]

Colour = tuple[float, float, float]

SHOWN_CLASSES = 12  # in the legend
SHOWN_SCORE = 0.3  # detections of a lower score are not drawn
VOC_COLOURS = 64  # beyond, VOC's colours are too much alike
PANEL_WIDTH, GAP, LEGEND_ROW = 3.4, 0.1, 0.24  # inches
DOTS_PER_INCH = 150


def voc_palette(count: int) -> Colours:
    """PASCAL VOC's colours, the bits of the class spread over red, green and blue: (count, 3)."""
    index = np.arange(count)
    colours = np.zeros((count, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> channel & 1) << (7 - bit)).astype(np.uint8)
        index >>= 3
    return colours


def rank_palette(count: int) -> Colours:
    """Colours (count, 3) that differ most between neighbours: hues a golden angle apart."""
    tones = ((0.62, 0.92), (0.85, 0.62), (0.40, 0.78))  # saturation, brightness
    colours = [
        colorsys.hsv_to_rgb((0.58 + 0.618034 * rank) % 1, *tones[rank % len(tones)])
        for rank in range(count)
    ]
    return (np.array(colours).reshape(count, 3) * 255).round().astype(np.uint8)


def shares(*maps: Tensor) -> dict[int, list[float]]:
    """Share of each class in each label map, those that are frequent in the first maps first."""
    found = [torch.unique(labels.cpu(), return_counts=True) for labels in maps]
    classes = sorted({int(c) for values, _ in found for c in values})
    table = {c: [0.0] * len(maps) for c in classes}
    for k, (values, counts) in enumerate(found):
        for c, count in zip(values.tolist(), counts.tolist(), strict=True):
            table[int(c)][k] = count / maps[k].numel()
    return dict(sorted(table.items(), key=lambda item: [-share for share in item[1]]))


def class_colours(
    table: dict[int, list[float]], palette: Sequence[tuple[int, int, int]] | None
) -> dict[int, Colour]:
    """A colour in 0..1 for each class of a table of shares.

    Networks of few classes have their palette, or VOC's, the same in all figures; among many
    classes only those in the picture are told apart.
    """
    highest = max(table, default=-1)
    if palette is not None and highest < len(palette):
        colours = np.array(palette, dtype=np.uint8)
        order = {c: c for c in table}
    elif highest < VOC_COLOURS:
        colours = voc_palette(VOC_COLOURS)
        order = {c: c for c in table}
    else:
        colours = rank_palette(len(table))
        order = {c: rank for rank, c in enumerate(table)}
    return {c: _colour(colours[k]) for c, k in order.items()}


def _colour(levels: Colours) -> Colour:
    red, green, blue = (float(level) / 255 for level in levels)
    return red, green, blue


def attack_figure(
    path: Path,
    *,
    image: Tensor,
    adversarial: Tensor,
    predicted: Tensor,
    attacked: Tensor,
    classes: Sequence[str] | None = None,
    palette: Sequence[tuple[int, int, int]] | None = None,
    note: str = "",
    magnify: float = 10,
) -> None:
    """Write the figure of the paper's slides as one PNG.

    Args:
        path: the file.
        image: (3, H, W) clean image in [0, 1].
        adversarial: (3, H, W) attacked image.
        predicted: (h, w) classes the network sees in `image`; enlarged to the image's size.
        attacked: (h, w) classes it sees in `adversarial`.
        classes: names for the legend.
        palette: colours (r, g, b) in 0..255 of the classes.
        note: a line below the panels.
        magnify: factor by which the perturbation is shown, around grey.
    """
    table = shares(predicted, attacked)
    colours = class_colours(table, palette)
    panels = {
        "image": _pixels(image),
        "its segmentation": _painted(predicted, colours),
        _times(magnify): _magnified(adversarial - image, magnify),
        "segmentation after the attack": _painted(attacked, colours),
    }
    size = (image.shape[1], image.shape[2])
    figure, _ = _four_panels(panels, size, _legend(table, colours, classes), note)
    _save(figure, path)


def detection_figure(
    path: Path,
    *,
    image: Tensor,
    adversarial: Tensor,
    predicted: Mapping[str, Tensor],
    attacked: Mapping[str, Tensor],
    classes: Sequence[str] | None = None,
    note: str = "",
    magnify: float = 10,
    least: float = SHOWN_SCORE,
) -> None:
    """Write the figure of an attack on a detector as one PNG.

    Args:
        path: the file.
        image: (3, H, W) clean image in [0, 1].
        adversarial: (3, H, W) attacked image.
        predicted: what the detector finds in `image`: "boxes" (D, 4), "labels" and "scores" (D,).
        attacked: what it finds in `adversarial`.
        classes: names for the boxes.
        note: a line below the panels.
        magnify: factor by which the perturbation is shown, around grey.
        least: score from which a detection is drawn.
    """
    panels = {
        "image": _pixels(image),
        "detections": _pixels(image),
        _times(magnify): _magnified(adversarial - image, magnify),
        "detections after the attack": _pixels(adversarial),
    }
    figure, axes = _four_panels(panels, (image.shape[1], image.shape[2]), [], note)
    seen = [
        {key: value.detach().cpu() for key, value in one.items()} for one in (predicted, attacked)
    ]
    highest = max((int(one["labels"].max()) for one in seen if len(one["labels"])), default=0)
    colours = voc_palette(max(highest + 1, VOC_COLOURS))
    for axis, one in zip((axes[1], axes[3]), seen, strict=True):
        order = one["scores"].argsort(stable=True).tolist()  # the best on top
        for d in order:
            score = float(one["scores"][d])
            if score >= least:
                label = int(one["labels"][d])
                text = f"{class_name(label, classes)} {score:.2f}"
                _box(axis, one["boxes"][d].tolist(), text, _colour(colours[label]))
    _save(figure, path)


def _times(magnify: float) -> str:
    return f"perturbation \N{MULTIPLICATION SIGN} {magnify:g}"


def _magnified(perturbation: Tensor, magnify: float) -> npt.NDArray[np.float32]:
    return _pixels((0.5 + magnify * perturbation).clamp(0, 1))


def _four_panels(
    panels: Mapping[str, npt.NDArray[np.float32]],
    size: tuple[int, int],
    entries: Sequence[tuple[Colour | None, str]],
    note: str,
) -> tuple[Figure, list[Axes]]:
    """Panels of images of (height, width) side by side, a legend and a note below."""
    height, width = size
    rows = -(-len(entries) // len(panels))
    panel_height = PANEL_WIDTH * height / width
    below = 0.2 + LEGEND_ROW * rows + (LEGEND_ROW if note else 0)
    columns = [GAP + k * (PANEL_WIDTH + GAP) for k in range(len(panels))]
    inches = (columns[-1] + PANEL_WIDTH + GAP, below + panel_height + 0.4)
    figure = Figure(figsize=inches, dpi=DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    shown = []
    for left, (title, pixels) in zip(columns, panels.items(), strict=True):
        box = (left / inches[0], below / inches[1])
        axes = figure.add_axes((*box, PANEL_WIDTH / inches[0], panel_height / inches[1]))
        shown.append(axes)
        axes.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest", aspect="auto")
        axes.set_title(title, fontsize=12, pad=6)
        axes.set_xticks([])
        axes.set_yticks([])
    for k, (colour, text) in enumerate(entries):
        row, column = divmod(k, len(panels))
        _entry(figure, columns[column], below - 0.1 - LEGEND_ROW * (row + 0.5), colour, text)
    if note:
        _text(figure, GAP, 0.06 + LEGEND_ROW / 2, note, "0.35")
    return figure, shown


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def _box(axes: Axes, corners: Sequence[float], text: str, colour: Colour) -> None:
    """A box with its label, in the pixels of the image."""
    left, top, right, bottom = corners
    axes.add_patch(
        Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, lw=1.8)
    )
    light = sum(colour) > 1.6
    axes.text(
        left,
        top,
        text.replace("$", r"\$"),
        fontsize=8,
        color="black" if light else "white",
        verticalalignment="top",
        clip_on=True,
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 1, "alpha": 0.85},
    )


def _pixels(image: Tensor) -> npt.NDArray[np.float32]:
    pixels: npt.NDArray[np.float32] = image.detach().float().cpu().permute(1, 2, 0).numpy()
    return pixels


def _painted(labels: Tensor, colours: dict[int, Colour]) -> npt.NDArray[np.float32]:
    values = labels.cpu().numpy()
    pixels = np.zeros((*values.shape, 3), dtype=np.float32)
    for c, colour in colours.items():
        pixels[values == c] = colour
    return pixels


def _legend(
    table: dict[int, list[float]],
    colours: dict[int, Colour],
    classes: Sequence[str] | None,
) -> list[tuple[Colour | None, str]]:
    """Colour and text of the classes with the largest share, before or after the attack."""
    most = sorted(table, key=lambda c: -max(table[c]))
    room = SHOWN_CLASSES if len(table) <= SHOWN_CLASSES else SHOWN_CLASSES - 1
    entries: list[tuple[Colour | None, str]] = []
    for c, (before, after) in table.items():
        if c in most[:room]:
            name = textwrap.shorten(class_name(c, classes), 28, placeholder="…")
            entries.append((colours[c], f"{name}  {before:.0%} → {after:.0%}"))
    if len(table) > room:
        entries.append((None, f"and {len(table) - room} more classes"))
    return entries


def _entry(figure: Figure, x: float, y: float, colour: Colour | None, text: str) -> None:
    """One entry of the legend, with its middle left at (x, y) inches."""
    if colour is not None:
        swatch = Rectangle(
            (x, y - 0.06),
            0.2,
            0.12,
            facecolor=colour,
            edgecolor="0.4",
            linewidth=0.5,
            transform=figure.dpi_scale_trans,
        )
        figure.add_artist(swatch)
        x += 0.27
    _text(figure, x, y, text, "black")


def _text(figure: Figure, x: float, y: float, text: str, colour: str) -> None:
    figure.text(
        x,
        y,
        text.replace("$", r"\$"),
        fontsize=10,
        color=colour,
        verticalalignment="center_baseline",
        transform=figure.dpi_scale_trans,
    )


def class_name(index: int, classes: Sequence[str] | None) -> str:
    """A class as people read it."""
    if classes is None or index >= len(classes):
        return f"class {index}"
    return str(classes[index])
