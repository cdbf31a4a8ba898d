"""The paper's figures of an attack: image, prediction, perturbation, prediction under attack."""

from __future__ import annotations

import colorsys
import functools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..files import atomic_write
from .predict import Prediction

Colours = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]
Picture = Image.Image

SHOWN_CLASSES = 12  # maximum in the legend
SHOWN_SCORE = 0.3  # detections with a lower score are not drawn
VOC_COLOURS = 64  # with more classes, VOC's colours are too similar
PANEL_WIDTH, PANEL_HEIGHT = 510, 2040  # at most, in pixels, like all lengths here
GAP = 15  # between panels, and around the figure
TITLE, TEXT, LABEL = 25, 21, 17  # sizes of letters
LINE = 32  # from a line of the legend to the next
KEY = 42, 14  # width and height of a colour in the legend
BLACK, GREY, WHITE = (0, 0, 0), (89, 89, 89), (255, 255, 255)


class Entry(NamedTuple):
    """An entry of the legend; without a colour, text alone."""

    text: str
    colour: Colour | None = None


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
    tones = (0.62, 0.92), (0.85, 0.62), (0.40, 0.78)  # saturation, brightness
    colours = [
        colorsys.hsv_to_rgb((0.58 + 0.618034 * k) % 1, *tones[k % len(tones)]) for k in range(count)
    ]
    return (np.reshape(colours, (count, 3)) * 255).round().astype(np.uint8)


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
    """Return a colour for each class of a table of shares.

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
    red, green, blue = (int(level) for level in levels)
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
    height, width = image.shape[1:]
    scale = min(PANEL_WIDTH / width, PANEL_HEIGHT / height)
    size = max(round(scale * width), 1), max(round(scale * height), 1)
    magnified = 0.5 + magnify * (adversarial - image)
    entries: list[Entry] = []
    if isinstance(predicted, Tensor) and isinstance(attacked, Tensor):
        table = shares(predicted, attacked)
        colours = class_colours(table, palette)
        entries = _legend(table, colours, classes)
        titles = "its segmentation", "segmentation after the attack"
        before, after = (_enlarged(_painted(seen, colours), size) for seen in (predicted, attacked))
    else:
        assert isinstance(predicted, Mapping)
        assert isinstance(attacked, Mapping)
        titles = "detections", "detections after the attack"
        before, after = (_enlarged(_pixels(seen), size) for seen in (image, adversarial))
        for panel, found in ((before, predicted), (after, attacked)):
            _draw_boxes(panel, found, (size[0] / width, size[1] / height), classes, least)
    panels = {
        "image": _enlarged(_pixels(image), size),
        titles[0]: before,
        f"perturbation \N{MULTIPLICATION SIGN} {magnify:g}": _enlarged(_pixels(magnified), size),
        titles[1]: after,
    }
    figure = _arrange(panels, entries, note)
    with atomic_write(path) as temporary:
        figure.save(temporary, format="png", compress_level=1)


def _arrange(panels: Mapping[str, Picture], entries: Sequence[Entry], note: str) -> Picture:
    """Return a figure of panels with their titles, side by side, a legend and a note below."""
    columns, (width, height) = len(panels), next(iter(panels.values())).size
    note = " ".join(note.split())
    top = GAP + TITLE + GAP
    legend = top + height + GAP
    foot = legend + LINE * -(-len(entries) // columns) + bool(entries) * GAP
    right = max(columns * (PANEL_WIDTH + GAP), GAP + round(_font(TEXT).getlength(note)))
    figure = Image.new("RGB", (GAP + right, foot + bool(note) * LINE), WHITE)
    draw = ImageDraw.Draw(figure)
    for k, (title, panel) in enumerate(panels.items()):
        left = GAP + k * (PANEL_WIDTH + GAP)
        draw.text((left + PANEL_WIDTH // 2, top - GAP), title, BLACK, _font(TITLE), anchor="ms")
        figure.paste(panel, (left, top))
        draw.rectangle((left - 1, top - 1, left + width, top + height), outline=BLACK)
        for row, entry in enumerate(entries[k::columns]):  # from panel to panel, row by row
            middle = legend + LINE * row + LINE // 2
            at = left
            if entry.colour is not None:
                key = left, middle - KEY[1] // 2, left + KEY[0], middle + KEY[1] // 2
                draw.rectangle(key, fill=entry.colour, outline=GREY)
                at += KEY[0] + GAP
            draw.text((at, middle), entry.text, BLACK, _font(TEXT), anchor="lm")
    draw.text((GAP, foot), note, GREY, _font(TEXT), anchor="la")
    return figure


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(mpl.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)


def _draw_boxes(
    panel: Picture,
    found: Mapping[str, Tensor],
    scale: tuple[float, float],
    classes: Sequence[str] | None,
    least: float,
) -> None:
    """Draw detections with their classes and scores; `scale` is the panel's size / the image's."""
    draw = ImageDraw.Draw(panel, "RGBA")
    # Lines beyond the panel are invisible, however far beyond.
    beyond = torch.tensor([*panel.size] * 2) + 9
    boxes = (found["boxes"].cpu() * torch.tensor(scale * 2)).clamp(-torch.tensor(9), beyond).round()
    labels, scores = (found[key].tolist() for key in ("labels", "scores"))
    for d in found["scores"].argsort(stable=True).tolist():  # the best on top
        left, top, right, bottom = boxes[d].tolist()
        if scores[d] < least or not (left <= right and top <= bottom):
            continue
        colour = _colour(voc_palette(labels[d] + 1)[-1])
        draw.rectangle((left, top, right, bottom), outline=colour, width=4)
        text = f"{class_name(labels[d], classes)} {scores[d]:.2f}"
        start = left + 3, top + 2
        around = draw.textbbox(start, text, _font(LABEL), anchor="la")
        draw.rectangle((left, top, around[2] + 3, top + LABEL + 5), fill=(*colour, 217))
        draw.text(start, text, BLACK if sum(colour) > 408 else WHITE, _font(LABEL), anchor="la")


def _pixels(image: Tensor) -> Colours:
    """Return an image (3, H, W) as levels (H, W, 3)."""
    levels = (image.detach().float().cpu().nan_to_num().clamp(0, 1) * 255).round().byte()
    pixels: Colours = levels.permute(1, 2, 0).numpy()
    return pixels


def _painted(labels: Tensor, colours: dict[int, Colour]) -> Colours:
    values = labels.cpu().numpy()
    pixels = np.zeros((*values.shape, 3), dtype=np.uint8)
    for c, colour in colours.items():
        pixels[values == c] = colour
    return pixels


def _enlarged(pixels: Colours, size: tuple[int, int]) -> Picture:
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def _legend(
    table: dict[int, list[float]],
    colours: dict[int, Colour],
    classes: Sequence[str] | None,
) -> list[Entry]:
    """Return legend entries for the classes with the largest share before or after the attack."""
    room = SHOWN_CLASSES if len(table) <= SHOWN_CLASSES else SHOWN_CLASSES - 1
    most = sorted(table, key=lambda c: -max(table[c]))[:room]
    entries = []
    for c, (before, after) in table.items():
        if c in most:
            name = textwrap.shorten(class_name(c, classes), 28, placeholder="…")
            entries.append(Entry(f"{name}  {before:.0%} → {after:.0%}", colours[c]))
    if len(table) > room:
        entries.append(Entry(f"and {len(table) - room} more classes"))
    return entries


def class_name(index: int, classes: Sequence[str] | None) -> str:
    """Return the name of a class, or "class INDEX" if it has none."""
    if classes is None or index >= len(classes):
        return f"class {index}"
    return str(classes[index])
