"""The paper's figures of an attack: image, prediction, perturbation, prediction under attack."""

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

SHOWN_CLASSES = 12  # maximum in the legend
SHOWN_SCORE = 0.3  # detections with a lower score are not drawn
VOC_COLOURS = 64  # with more classes, VOC's colours are too similar
PANEL_WIDTH = 3.4  # inches
GAP = 0.03  # between panels, in panel widths


def voc_palette(count: int) -> Colours:
    """Return PASCAL VOC's colours (count, 3): the class's bits spread over red, green and blue."""
    index = np.arange(count)
    colours = np.zeros((count, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> channel & 1) << (7 - bit)).astype(np.uint8)
        index >>= 3
    return colours


def rank_palette(count: int) -> Colours:
    """Return colours (count, 3) whose neighbours differ most: hues a golden angle apart."""
    rank = np.arange(count)
    tones = np.array([(0.62, 0.92), (0.85, 0.62), (0.40, 0.78)])  # saturation, brightness
    hues = (0.58 + 0.618034 * rank[:, None]) % 1
    colours = hsv_to_rgb(np.hstack([hues, tones[rank % len(tones)]]))
    return (colours * 255).round().astype(np.uint8)


def shares(*maps: Tensor) -> dict[int, list[float]]:
    """Return the share of each class in each label map, sorted by the shares in the first map."""
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
    """Return a colour in 0..1 for each class of a table of shares.

    With few classes, colours are the network's palette or VOC's, the same in all figures. With
    many classes, they only distinguish the classes in the picture.
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
        path: path of the file.
        image: clean image (3, H, W) in [0, 1].
        adversarial: attacked image (3, H, W).
        predicted: prediction on `image`: classes (h, w), which are enlarged to the image's size,
            or detections: "boxes" (D, 4), "labels" and "scores" (D,).
        attacked: prediction on `adversarial`.
        classes: class names for the legend or the boxes.
        palette: colours (r, g, b) in 0..255 of the classes of label maps.
        note: line below the panels.
        magnify: factor by which the perturbation is multiplied; it is shown around grey.
        least: minimum score of the detections that are drawn.
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


def _panels(figure: Figure, ratio: float) -> list[Axes]:
    """Return four panels that fill a figure except for gaps. `ratio` is their height / width."""
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
    """Draw detections with their classes and scores, in pixel coordinates of the image."""
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
    """Return legend entries for the classes with the largest share before or after the attack."""
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
    """Escape the dollar signs of a text for matplotlib."""
    return text.replace("$", r"\$")


def class_name(index: int, classes: Sequence[str] | None) -> str:
    """Return the name of a class, or "class INDEX" if it has none."""
    if classes is None or index >= len(classes):
        return f"class {index}"
    return str(classes[index])
