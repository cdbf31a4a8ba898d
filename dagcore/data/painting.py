"""Paint a scene: a background, clutter, then the objects from back to front.

The arithmetic is restricted as in `shapes`, so that a scene has the same pixels on every machine.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from . import shapes
from .shapes import Array, Outline, Pattern, Random, clip, least, most, pick, uniform

Color: TypeAlias = tuple[float, float, float]
Pixels: TypeAlias = npt.NDArray[np.uint8]
Window: TypeAlias = tuple[slice, slice]

# Some classes share an outline and some a pattern, so that neither alone identifies a class. The
# pattern is only the usual one: some objects have a random pattern.
OBJECTS: dict[str, tuple[Outline, Pattern]] = {
    "ball": (shapes.disc, shapes.gloss),
    "target": (shapes.disc, shapes.rings),
    "ring": (shapes.ring, shapes.stripes),
    "triangle": (shapes.triangle, shapes.stripes),
    "square": (shapes.square, shapes.checks),
    "cross": (shapes.cross, shapes.checks),
    "star": (shapes.star, shapes.dots),
    "heart": (shapes.heart, shapes.dots),
    "crescent": (shapes.crescent, shapes.patches),
    "arrow": (shapes.arrow, shapes.patches),
    "hexagon": (shapes.hexagon, shapes.grid),
    "window": (shapes.square, shapes.grid),
}
ANY_PATTERN = 0.3  # share of the objects with a random pattern
MADE_OF = 0.85  # share of the objects that show their class's material
# Directions of the materials in colour space. They hardly change the brightness. Each has a root
# mean square of 1.
TINTS = ((1.225, -1.225, 0.0), (0.707, 0.707, -1.414), (0.707, -1.414, 0.707))


@dataclasses.dataclass(frozen=True)
class Family:
    """The look of a family of scenes. Lengths are in pixels, colours and levels in [0, 1]."""

    colors: tuple[Color, ...]  # of backgrounds, clutter and objects alike
    layouts: tuple[str, ...]
    light: tuple[float, float]  # direction that it comes from, (x, y)
    exposure: tuple[float, float]
    noise: tuple[float, float]  # standard deviation
    color_noise: bool
    objects: tuple[int, int]
    radius: tuple[float, float]


def _percent(text: str) -> tuple[Color, ...]:
    """Parse colours written as "r g b, r g b", in percent."""
    return tuple(
        (int(r) / 100, int(g) / 100, int(b) / 100) for r, g, b in map(str.split, text.split(","))
    )


FAMILIES = {
    "07": Family(
        colors=_percent("48 40 30, 35 38 25, 55 50 44, 85 22 18, 20 45 80, 95 75 20, 25 65 30"),
        layouts=("blotches", "planks"),
        light=(-0.7, -0.7),
        exposure=(0.9, 1.1),
        noise=(0.01, 0.03),
        color_noise=False,
        objects=(1, 4),
        radius=(18, 48),
    ),
    "12": Family(
        colors=_percent("32 38 48, 50 54 58, 25 32 36, 90 55 45, 40 75 75, 75 50 80, 80 82 45"),
        layouts=("blotches", "tiles", "horizon"),
        light=(0.8, -0.5),
        exposure=(0.7, 1.15),
        noise=(0.004, 0.01),
        color_noise=True,
        objects=(2, 5),
        radius=(14, 40),
    ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """A drawn scene.

    Attributes:
        image: (3, H, W), the 8-bit picture.
        instances: (H, W), 0 for the background, k for the k-th object from the back.
        labels: class of each object, from the back.
        areas: number of pixels in the frame that each object would cover if it were alone.
    """

    image: Pixels
    instances: Pixels
    labels: tuple[int, ...]
    areas: tuple[int, ...]


def draw(family: Family, size: tuple[int, int], rng: Random, material: float) -> Scene:
    """Paint a scene of (height, width) pixels. `material` is the materials' root mean square."""
    canvas = _background(family, size, rng)
    for _ in range(4 + int(rng.random() * 7)):
        _clutter(canvas, family, rng)
    fewest, greatest = family.objects
    instances = np.zeros(size, dtype=np.uint8)
    labels, areas = [], []
    centers: list[tuple[float, float]] = []
    for k in range(1, fewest + int(rng.random() * (greatest - fewest + 1)) + 1):
        label = int(rng.random() * len(OBJECTS))
        outline, pattern = tuple(OBJECTS.values())[label]
        if rng.random() < ANY_PATTERN:
            pattern = pick(rng, shapes.PATTERNS)
        radius = uniform(rng, *family.radius)
        centers.append(_place(centers, size, radius, rng))
        patch = Patch.random(size, centers[-1], radius, rng)
        distance = outline(patch.u, patch.v)
        _shadow(canvas, patch, distance, family)
        _paint(canvas, patch, distance, pattern, family, rng)
        if rng.random() < MADE_OF:
            _weave(canvas, patch, distance, label, material)
        covered = distance >= 0
        instances[patch.window][covered] = k
        labels.append(label + 1)
        areas.append(int(np.count_nonzero(covered)))
    return Scene(_expose(canvas, family, rng), instances, tuple(labels), tuple(areas))


@dataclasses.dataclass(frozen=True, eq=False)
class Patch:
    """A part of the picture, in the coordinates of the object that is painted there.

    Attributes:
        window: rows and columns of the patch.
        x: (1, w), columns relative to the centre, in radii.
        y: (h, 1), rows relative to the centre, in radii.
        u: (h, w), position along the object's first axis, rotated, stretched and sheared.
        v: (h, w), position along its second axis.
        scale: number of pixels per unit of u or v, whichever is smaller.
    """

    window: Window
    x: Array
    y: Array
    u: Array
    v: Array
    scale: float

    @classmethod
    def random(
        cls,
        size: tuple[int, int],
        center: tuple[float, float],
        radius: float,
        rng: Random,
        stretch: tuple[float, float] | None = None,
    ) -> Patch:
        """Return a patch around `center` (row, column), rotated and sheared at random."""
        cos, sin = shapes.rotation(rng)
        long, wide = stretch or (uniform(rng, 0.85, 1.1), uniform(rng, 0.75, 1.0))
        shear = uniform(rng, -0.25, 0.25) * wide
        # (x, y) = [[cos, -sin], [sin, cos]] [[long, shear], [0, wide]] (u, v)
        xv, yv = cos * shear - sin * wide, sin * shear + cos * wide
        reach_x = 1.2 * math.sqrt(cos * long * cos * long + xv * xv)
        reach_y = 1.2 * math.sqrt(sin * long * sin * long + yv * yv)
        rows, y = _span(center[0], radius, reach_y, size[0])
        columns, x = _span(center[1], radius, reach_x, size[1])
        x, y = x[None, :], y[:, None]
        area = long * wide
        u = x * np.float32(yv / area) - y * np.float32(xv / area)
        v = y * np.float32(cos * long / area) - x * np.float32(sin * long / area)
        return cls((rows, columns), x, y, u, v, radius * min(long, wide))


def _span(center: float, radius: float, reach: float, extent: int) -> tuple[slice, Array]:
    """Return the pixels within `reach` radii of the centre, and their positions in radii."""
    first = min(max(int(center - radius * reach), 0), extent - 1)
    last = min(max(int(center + radius * reach) + 1, first + 1), extent)
    pixels = np.arange(first, last, dtype=np.float32)
    return slice(first, last), (pixels + np.float32(0.5 - center)) * np.float32(1 / radius)


def _place(
    others: list[tuple[float, float]], size: tuple[int, int], radius: float, rng: Random
) -> tuple[float, float]:
    """Draw a centre (row, column): half the time, the one of three farthest from the others."""
    best, farthest = (0.0, 0.0), -1.0
    for _ in range(1 if rng.random() < 0.5 else 3):
        row, column = (uniform(rng, 0.6 * radius, extent - 0.6 * radius) for extent in size)
        near = min(
            ((row - y) * (row - y) + (column - x) * (column - x) for y, x in others), default=0.0
        )
        if near > farthest:
            best, farthest = (row, column), near
    return best


def _colors(rng: Random, palette: tuple[Color, ...]) -> tuple[Color, Color]:
    """Draw two colours, one much lighter than the other."""
    first = _jitter(rng, pick(rng, palette))
    other = _jitter(rng, pick(rng, palette))
    mixed = [0.6 * a + 0.4 * b for a, b in zip(first, other, strict=True)]
    if 0.3 * first[0] + 0.6 * first[1] + 0.1 * first[2] > 0.5:
        r, g, b = (uniform(rng, 0.25, 0.5) * level for level in mixed)
    else:
        r, g, b = (1 - uniform(rng, 0.25, 0.5) * (1 - level) for level in mixed)
    return first, (r, g, b)


def _jitter(rng: Random, color: Color) -> Color:
    r, g, b = (min(max(level + uniform(rng, -0.12, 0.12), 0.03), 0.97) for level in color)
    return r, g, b


def _paint(
    canvas: Array,
    patch: Patch,
    distance: Array,
    pattern: Pattern,
    family: Family,
    rng: Random,
    opacity: float = 1.0,
) -> None:
    """Paint a pattern inside an outline, lit from one side and darker towards the edge."""
    cover = clip(distance * np.float32(patch.scale) + np.float32(0.5))
    if opacity < 1:
        cover *= np.float32(opacity)
    bevel = uniform(rng, 0.15, 0.3) if pattern is not shapes.gloss else 0.8
    edge = most(np.float32(1) - distance * np.float32(1 / bevel), np.float32(0))
    shade = edge * edge
    shade *= np.float32(-uniform(rng, 0.2, 0.45))
    slope = uniform(rng, 0.1, 0.3)
    shade += patch.x * np.float32(slope * family.light[0]) + np.float32(1)
    shade += patch.y * np.float32(slope * family.light[1])
    surface = pattern(patch.u, patch.v, patch.scale, rng)
    colors = _colors(rng, family.colors)
    if pattern is shapes.gloss:  # the highlight has the lighter colour
        colors = min(colors, key=lambda c: c[1]), max(colors, key=lambda c: c[1])
    for channel, first, second in zip(canvas, *colors, strict=True):
        color = surface * np.float32(second - first)
        color += np.float32(first)
        color *= shade
        region = channel[patch.window]
        color -= region
        color *= cover
        region += color


def _weave(canvas: Array, patch: Patch, distance: Array, label: int, material: float) -> None:
    """Add the material of a class inside an outline.

    It is one of four weaves with a period of four pixels, in one of three tints. Mirroring the
    picture does not turn a weave into another one.
    """
    rows, columns = (np.arange(part.start, part.stop) // 2 % 2 for part in patch.window)
    row, column = rows[:, None], columns[None, :]
    weave, strength = (
        (1 - 2 * row, 1.0),
        (1 - 2 * column, 1.0),
        (1 - 2 * (row ^ column), 1.0),
        (4 * (row & column) - 1, 0.5774),
    )[label % 4]
    cover = clip(distance * np.float32(patch.scale) + np.float32(0.5))
    cover *= weave.astype(np.float32)
    for channel, share in zip(canvas, TINTS[label // 4], strict=True):
        channel[patch.window] += cover * np.float32(material * strength * share)


def _shadow(canvas: Array, patch: Patch, distance: Array, family: Family) -> None:
    """Cast a shadow on the side away from the light."""
    dark = np.float32(1) - np.float32(0.45) * clip(
        distance * np.float32(patch.scale / 5) + np.float32(0.5)
    )
    into, out = [], []
    for window, light, extent in zip(
        patch.window, reversed(family.light), canvas.shape[1:], strict=True
    ):
        shift = int(light * -patch.scale / 5)
        first, last = max(window.start + shift, 0), min(window.stop + shift, extent)
        into.append(slice(first, last))
        out.append(slice(first - window.start - shift, last - window.start - shift))
    canvas[:, into[0], into[1]] *= dark[out[0], out[1]]


def _clutter(canvas: Array, family: Family, rng: Random) -> None:
    """Paint clutter without a class: a ragged blob with any pattern, or a plain stroke."""
    size = canvas.shape[1], canvas.shape[2]
    center = uniform(rng, 0, size[0]), uniform(rng, 0, size[1])
    if rng.random() < 0.5:
        stretch = uniform(rng, 1.0, 2.5), uniform(rng, 0.06, 0.14)
        patch = Patch.random(size, center, uniform(rng, 12, 30), rng, stretch)
        distance, pattern = shapes.square(patch.u, patch.v), shapes.plain
    else:
        patch = Patch.random(size, center, uniform(rng, 10, 26), rng)
        ragged = shapes.smooth_noise(rng, patch.u.shape, 4, 4)
        distance = shapes.disc(patch.u, patch.v) + np.float32(1.2) * (ragged - np.float32(0.75))
        pattern = pick(rng, shapes.PATTERNS)
    _paint(canvas, patch, distance, pattern, family, rng, uniform(rng, 0.4, 0.9))


def _pixels(size: tuple[int, int]) -> tuple[Array, Array]:
    """Return the indices of the rows (H, 1) and of the columns (1, W)."""
    y, x = (np.arange(extent, dtype=np.float32) for extent in size)
    return y[:, None], x[None, :]


def _background(family: Family, size: tuple[int, int], rng: Random) -> Array:
    """Paint a background (3, H, W): two colours mixed by a layout, with grain."""
    height, width = size
    coarse = shapes.smooth_noise(rng, size, 3, 4)
    fine = shapes.smooth_noise(rng, size, 24, 30)
    layout = pick(rng, family.layouts)
    y, x = _pixels(size)
    if layout == "blotches":
        mix = clip((coarse - np.float32(0.5)) * np.float32(3) + np.float32(0.5))
    elif layout == "horizon":
        place = uniform(rng, 0.2, 0.8) * height
        mix = clip(
            (y - np.float32(place)) * np.float32(0.2) + np.float32(4) * (coarse - np.float32(0.5))
        )
        mix = mix * np.float32(0.7) + y * np.float32(0.3 / height)
    else:
        cos, sin = shapes.rotation(rng)
        pitch = uniform(rng, 14, 34)
        a = x * np.float32(cos / pitch) + y * np.float32(sin / pitch)
        if layout == "planks":
            a += coarse * np.float32(0.8)
            mix = (
                clip(shapes.wave(a) * np.float32(4) + np.float32(0.5)) * np.float32(0.5)
                + np.float32(0.5) * coarse
            )
        else:
            b = y * np.float32(cos / pitch) - x * np.float32(sin / pitch)
            joint = most(shapes.wave(a), shapes.wave(b)) - np.float32(0.42)
            mix = clip(joint * np.float32(pitch / 2)) * np.float32(0.7) + np.float32(0.3) * coarse
    grain = (fine - np.float32(0.5)) * np.float32(uniform(rng, 0.15, 0.45)) + np.float32(1)
    first, second = (_jitter(rng, pick(rng, family.colors)) for _ in range(2))
    canvas = np.empty((3, height, width), dtype=np.float32)
    for channel, one, other in zip(canvas, first, second, strict=True):
        np.multiply(mix, np.float32(other - one), out=channel)
        channel += np.float32(one)
        channel *= grain
    return canvas


def _expose(canvas: Array, family: Family, rng: Random) -> Pixels:
    """Return the 8-bit picture (3, H, W): apply light that falls off, then the sensor's noise."""
    _, height, width = canvas.shape
    exposure, falloff = uniform(rng, *family.exposure), uniform(rng, 0.1, 0.5)
    y, x = _pixels((height, width))
    x, y = x * np.float32(1 / width) - np.float32(0.5), y * np.float32(1 / height) - np.float32(0.5)
    light = x * np.float32(falloff * family.light[0]) + y * np.float32(falloff * family.light[1])
    light += np.float32(1)
    light *= np.float32(255 * exposure)
    canvas *= light
    # The sum of two uniform bytes has a standard deviation of 104.5.
    shape = (2, *canvas.shape) if family.color_noise else (2, 1, height, width)
    one, other = rng.integers(0, 256, shape, dtype=np.uint8)
    noise = one.astype(np.float32) + other - np.float32(255)
    noise *= np.float32(uniform(rng, *family.noise) * 255 / 104.5)
    canvas += noise
    canvas += np.float32(0.5)
    levels = least(most(canvas, np.float32(0)), np.float32(255))
    return levels.astype(np.uint8)
