"""The paper's figures of an attack: image, what is seen, perturbation, what is seen after it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from ..files import atomic_write
from .predict import Prediction

Colours = npt.NDArray[np.uint8]

Colour = tuple[float, float, float]

SHOWN_CLASSES = 12  # in the legend
SHOWN_SCORE = 0.3  # detections of a lower score are not drawn
VOC_COLOURS = 64  # beyond, VOC's colours are too much alike
PANEL_WIDTH = 3.4  # inches
GAP = 0.03  # between panels, in their width


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
    rank = np.arange(count)
    tones = np.array([(0.62, 0.92), (0.85, 0.62), (0.40, 0.78)])  # saturation, brightness
    hues = (0.58 + 0.618034 * rank[:, None]) % 1
    colours = hsv_to_rgb(np.hstack([hues, tones[rank % len(tones)]]))
    return (colours * 255).round().astype(np.uint8)


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
    order = {c: c for c in table}
    if palette is not None and highest < len(palette):
        colours = np.array(palette, dtype=np.uint8)
    elif highest < VOC_COLOURS:
        colours = voc_palette(VOC_COLOURS)
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
    predicted: Prediction,
    attacked: Prediction,
    classes: Sequence[str] | None = None,
    palette: Sequence[tuple[int, int, int]] | None = None,
    note: str = "",
    magnify: float = 10,
    least: float = SHOWN_SCORE,
) -> None:
    """Write the figure of the paper's slides as one PNG.

    Args:
        path: the file.
        image: (3, H, W) clean image in [0, 1].
        adversarial: (3, H, W) attacked image.
        predicted: what the network sees in `image`: classes (h, w), enlarged to the image's size,
            or detections: "boxes" (D, 4), "labels" and "scores" (D,).
        attacked: what it sees in `adversarial`.
        classes: names for the legend or the boxes.
        palette: colours (r, g, b) in 0..255 of the classes of label maps.
        note: a line below the panels.
        magnify: factor by which the perturbation is shown, around grey.
        least: score from which a detection is drawn.
    """
    figure = Figure(dpi=150)
    panels = _panels(figure, image.shape[1] / image.shape[2])
    times = f"perturbation \N{MULTIPLICATION SIGN} {magnify:g}"
    magnified = (0.5 + magnify * (adversarial - image)).clamp(0, 1)
    _show(panels[0], "image", _pixels(image), image)
    _show(panels[2], times, _pixels(magnified), image)
    entries: list[Patch] = []
    if isinstance(predicted, Tensor) and isinstance(attacked, Tensor):
        table = shares(predicted, attacked)
        colours = class_colours(table, palette)
        entries = _legend(table, colours, classes)
        _show(panels[1], "its segmentation", _painted(predicted, colours), image)
        _show(panels[3], "segmentation after the attack", _painted(attacked, colours), image)
    elif isinstance(predicted, Mapping) and isinstance(attacked, Mapping):
        _show(panels[1], "detections", _pixels(image), image)
        _show(panels[3], "detections after the attack", _pixels(adversarial), image)
        _draw_boxes(panels[1], predicted, classes, least)
        _draw_boxes(panels[3], attacked, classes, least)
    for k, axes in enumerate(panels):  # the legend goes from panel to panel, row by row
        place = {"bbox_to_anchor": (0, -0.02), "borderpad": 0, "borderaxespad": 0}
        axes.legend(handles=entries[k::4], loc="upper left", frameon=False, **place)
    rows = -(-len(entries) // 4)
    panels[0].set_xlabel(_plain(note), loc="left", labelpad=8 + 16 * rows, color="0.35")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight", facecolor="white")


"""The same, for detections."""


def _panels(figure: Figure, ratio: float) -> list[Axes]:
    """Four panels of a ratio height / width that fill a figure, but for gaps between them."""
    figure.set_size_inches(PANEL_WIDTH * (4 + 3 * GAP), PANEL_WIDTH * ratio)
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=GAP)
    return list(figure.subplots(1, 4))


def _show(axes: Axes, title: str, pixels: npt.NDArray[np.float32], image: Tensor) -> None:
    """Show pixels, enlarged to the size of the image (3, H, W)."""
    _, height, width = image.shape
    axes.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest", aspect="auto")
    axes.set_title(title, fontsize=12)
    axes.set(xticks=[], yticks=[])


def _draw_boxes(
    axes: Axes, found: Mapping[str, Tensor], classes: Sequence[str] | None, least: float
) -> None:
    """Draw detections with their classes and scores, in the pixels of the image."""
    boxes, labels, scores = (found[key].tolist() for key in ("boxes", "labels", "scores"))
    for d in found["scores"].argsort(stable=True).tolist():  # the best on top
        if scores[d] < least:
            continue
        left, top, right, bottom = boxes[d]
        colour = _colour(voc_palette(labels[d] + 1)[-1])
        frame = Rectangle((left, top), right - left, bottom - top)
        frame.set(fill=False, edgecolor=colour, linewidth=1.8)
        axes.add_patch(frame)
        axes.text(
            left,
            top,
            _plain(f"{class_name(labels[d], classes)} {scores[d]:.2f}"),
            fontsize=8,
            color="black" if sum(colour) > 1.6 else "white",
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
) -> list[Patch]:
    """Colour and text of the classes with the largest share, before or after the attack."""
    room = SHOWN_CLASSES if len(table) <= SHOWN_CLASSES else SHOWN_CLASSES - 1
    most = sorted(table, key=lambda c: -max(table[c]))[:room]
    entries = []
    for c, (before, after) in table.items():
        if c in most:
            name = textwrap.shorten(class_name(c, classes), 28, placeholder="…")
            label = _plain(f"{name}  {before:.0%} → {after:.0%}")
            entries.append(Patch(facecolor=colours[c], edgecolor="0.4", linewidth=0.5, label=label))
    if len(table) > room:
        entries.append(
            Patch(fill=False, linewidth=0, label=f"and {len(table) - room} more classes")
        )
    return entries


def _plain(text: str) -> str:
    """A text whose dollar signs matplotlib leaves as they are."""
    return text.replace("$", r"\$")


def class_name(index: int, classes: Sequence[str] | None) -> str:
    """A class as people read it."""
    if classes is None or index >= len(classes):
        return f"class {index}"
    return str(classes[index])
