"""What is public beside the ops, on generated input: something right, or an error that says why."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import ANYTHING, SEEDS, one_in, strange_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import DTYPES, LABEL_DTYPES, generator, random_case
from torch import Tensor, nn

from dagcore import DAG, Part, Sample, joint_attack, labels, perturbation, universal_perturbation
from dagcore.data.coco import CocoBoxes
from dagcore.data.voc import OBJECTS, read_voc_boxes
from dagcore.files import IGNORE, frame_count, read_image, read_label_map

FEW = settings(max_examples=settings().max_examples // 3)
NAN, INF = math.nan, math.inf


def attempt(names: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call returns, or None: after an error of the right kind that names its argument, and
    for a tensor without values."""
    try:
        result = function(*args, **kwargs)
        return None if isinstance(result, Tensor) and result.is_meta else result
    except (TypeError, ValueError, OSError) as error:
        refused = error
    named = re.search(rf"(?<!\w)({names})(?!\w)", str(refused))
    assert named, f"{refused!r} names none of {names}"
    return None


def maybe_spoilt(draw: st.DrawFn, value: Any, count: int = 6) -> Any:
    """A value, or in one of `count` cases something else."""
    if not one_in(draw, count):
        return value
    pool = [*ANYTHING, *(strange_tensors(value) if isinstance(value, Tensor) else ())]
    return pool[draw(st.integers(0, len(pool) - 1))]


def some_generator(draw: st.DrawFn) -> Any:
    return draw(st.sampled_from((generator, generator, lambda _: None, str)))(7)


# --- labels


@FEW
@given(data=st.data())
def test_assign(data: st.DataObject) -> None:
    num_classes = data.draw(st.sampled_from((1, 2, 3, 21, 256, 300)))
    ignored = data.draw(st.sampled_from((255, -1, 0, 2**40)))
    shape = (
        data.draw(st.integers(0, 3)),
        num_classes,
        *data.draw(st.sampled_from(((), (0,), (9,)))),
    )
    _, own, other = random_case(shape, data.draw(SEEDS), ignore_index=ignored)
    own = own.to(data.draw(st.sampled_from(LABEL_DTYPES)))
    kind = data.draw(st.sampled_from(("permutation", "random", "runner-up", other)))
    got = attempt(
        "adversarial_labels|labels|num_classes|ignore_index|generator",
        labels.assign,
        kind := maybe_spoilt(data.draw, kind),
        own := maybe_spoilt(data.draw, own),
        num_classes := maybe_spoilt(data.draw, num_classes),
        ignored := maybe_spoilt(data.draw, ignored),
        some_generator(data.draw),
    )
    if got is None:
        return
    if isinstance(kind, Tensor) or kind == "runner-up":
        assert got is kind
        return
    assert got.shape == own.shape
    counted = own.long() != ignored
    assert torch.equal(got.long()[~counted], own.long()[~counted])
    assert bool((got.long() != own.long())[counted].all())
    assert bool(((got >= 0) & (got.long() < num_classes))[counted].all())
    if kind == "permutation":
        for mine, drawn, counts in zip(own, got, counted, strict=True):
            pairs = torch.stack([mine.long()[counts], drawn.long()[counts]])
            found = pairs.unique(dim=1)
            assert found.shape[1] == len(found[0].unique()) == len(found[1].unique())


@FEW
@given(data=st.data())
def test_derangement(data: st.DataObject) -> None:
    count = data.draw(st.one_of(st.integers(-3, 60), st.sampled_from(ANYTHING)))
    source = some_generator(data.draw)
    got = attempt("num_classes|generator", labels.derangement, count, source)
    if got is not None:
        assert sorted(got.tolist()) == list(range(count))
        assert not bool((got == torch.arange(count)).any())


@FEW
@given(data=st.data())
def test_pattern(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(("circle", "square", "stripes", "text", "mask", "")))
    words = data.draw(st.text(st.characters(exclude_characters="/"), max_size=6))
    name = maybe_spoilt(data.draw, f"{kind}:{words}" if words else kind)
    sides = [maybe_spoilt(data.draw, data.draw(st.integers(1, 30)), 12) for _ in range(2)]
    got = attempt(f"pattern|name|height|width|{re.escape(words)}", labels.pattern, name, *sides)
    if got is not None:
        assert got.dtype == torch.bool
        assert got.shape == tuple(sides)


@FEW
@given(data=st.data())
def test_paint(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(((), (0,), (4, 5))))
    mask = torch.rand(shape, generator=generator(data.draw(SEEDS))) < 0.5
    before = torch.full(shape, 7).to(data.draw(st.sampled_from(LABEL_DTYPES)))
    inside, outside = data.draw(st.integers(0, 300)), data.draw(st.sampled_from((3, before)))
    given = (mask, inside, outside)
    mask, inside, outside = (maybe_spoilt(data.draw, value) for value in given)
    got = attempt("mask|foreground|background", labels.paint, mask, inside, outside)
    if got is not None:
        assert got.dtype == torch.int64
        assert bool((got[mask] == inside).all())
        kept = outside[~mask].long() if isinstance(outside, Tensor) else outside
        assert bool((got[~mask] == kept).all())


# --- perturbations


def some_perturbation(draw: st.DrawFn, shape: tuple[int, ...] | None = None) -> Tensor:
    if shape is None:
        shape = draw(st.sampled_from(((2, 3, 4, 5), (1, 3, 1, 1), (0, 3, 4, 5), (2, 3, 0, 5))))
    rng = generator(draw(SEEDS))
    return torch.randn(shape, generator=rng).to(draw(st.sampled_from(DTYPES)))


@FEW
@given(data=st.data())
def test_combine(data: st.DataObject) -> None:
    given = [some_perturbation(data.draw, (2, 3, 4)) for _ in range(data.draw(st.integers(0, 3)))]
    given = [maybe_spoilt(data.draw, value) for value in given]
    got = attempt("perturbations", perturbation.combine, *given)
    if got is not None:
        expected = torch.stack([r.double() for r in given]).sum(0)
        slack = 20 * max(torch.finfo(r.dtype).eps for r in given)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=slack)


@FEW
@given(data=st.data())
def test_permute(data: st.DataObject) -> None:
    r = maybe_spoilt(data.draw, some_perturbation(data.draw))
    source = some_generator(data.draw)
    got = attempt("perturbation|generator", perturbation.permute, r, source)
    if got is not None:
        assert got.dtype == r.dtype
        assert torch.equal(got.flatten(2).sort(2).values, r.flatten(2).sort(2).values)


@FEW
@given(data=st.data())
def test_fit(data: st.DataObject) -> None:
    r = maybe_spoilt(data.draw, some_perturbation(data.draw))
    size = maybe_spoilt(data.draw, (data.draw(st.integers(0, 8)), data.draw(st.integers(0, 8))))
    got = attempt("perturbation|size", perturbation.fit, r, size)
    if got is not None:
        assert got.shape == (*r.shape[:2], *size)
        common = tuple(map(min, r.shape[2:], size))
        kept = got[..., : common[0], : common[1]]
        assert torch.equal(kept, r[..., : common[0], : common[1]])
        assert int(got.count_nonzero()) == int(kept.count_nonzero())


@FEW
@given(data=st.data())
def test_perceptibility(data: st.DataObject) -> None:
    r = maybe_spoilt(data.draw, some_perturbation(data.draw))
    width = maybe_spoilt(data.draw, data.draw(st.sampled_from((1, 255, 2.0, 1e-3))))
    got = attempt("perturbation|value_range", perturbation.perceptibility, r, width)
    if got is not None:
        assert got.shape == r.shape[:1]
        for p, own in zip(got.tolist(), r.double() / width, strict=True):
            pixels = max(1, own[0].numel())
            expected = math.sqrt(float(own.square().sum()) / pixels)
            assert p == pytest.approx(expected, rel=1e-4, nan_ok=True)


@FEW
@given(data=st.data())
def test_round_to_8_bits(data: st.DataObject) -> None:
    images = maybe_spoilt(data.draw, some_perturbation(data.draw))
    low, high = data.draw(st.sampled_from(((0, 1), (0.0, 255.0), (-1, 1), (1, 0), (0, NAN))))
    bounds = maybe_spoilt(data.draw, (low, high))
    got = attempt("images|bounds", perturbation.round_to_8_bits, images, bounds)
    if got is not None:
        assert got.shape == images.shape
        assert got.dtype == images.dtype
        inside = images.double().clamp(*bounds)
        step = (bounds[1] - bounds[0]) / 255
        slack = 0.51 * step + 4 * torch.finfo(images.dtype).eps * max(map(abs, bounds))
        assert bool(((got.double() - inside).abs() <= slack).all())


# --- attacks

SETTINGS = {
    "gamma": (0.01, 0.5 / 255, 1, 1e-30, 1e300),
    "max_iter": (0, 1, 3),
    "goal": ("leave", "reach"),
    "bounds": ((0.0, 1.0), None, (-1, 2), (0.25, 0.75), (0, 1e-300), (-1e308, 1e308), (1, 0)),
    "epsilon": (None, 0.05, 1e-30, 1e300),
    "tolerance": (0.0, 0.5, 0.999, 1e-300, 1),
    "ignore_index": (255, -1, 0, 2**62),
    "backend": ("native", "reference"),
}
PIECES = "|".join((*SETTINGS, "images", "labels", "adversarial_labels", "generator", "at", "start"))
PIECES += "|callback|model|scores|samples?|slots|parts?|batch_size|image|lower"


class Linear(nn.Module):
    """Scores that are linear in the pixels, in training mode; `fault` spoils them."""

    def __init__(self, classes: int = 4, stride: int = 1, fault: str = "") -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, classes, stride, stride)
        weights = torch.randn(self.conv.weight.shape, generator=generator(1))
        self.conv.weight.data, self.conv.bias.data = weights, torch.zeros(classes)
        self.fault = fault

    def forward(self, images: Tensor, at: Any = None) -> Any:
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"model takes images (N, 3, H, W), got {tuple(images.shape)}")
        scores = self.conv.to(images.dtype)(images)
        match self.fault:
            case "nothing":
                return None
            case "a NaN":
                bright = (images > 0.97).flatten(1).any(1)
                return torch.where(bright.view(-1, 1, 1, 1), NAN, scores)
            case "integers":
                return scores.long()
            case "detached":
                return scores.detach()
            case "no classes":
                return scores[:, :0]
            case "one image":
                return scores[:1]
            case "flat":
                return scores.flatten(1)
            case "other input":
                return torch.zeros_like(scores).requires_grad_()
            case "a mapping":
                return {"out": scores}
            case "another mapping":
                return {"in": scores}
        return scores


FAULTS = ("", "", "", "a mapping", "a NaN", "nothing", "integers", "detached", "no classes")
FAULTS += ("one image", "flat", "other input", "another mapping")


def some_attack(draw: st.DrawFn, spoilt: int = 20) -> DAG | None:
    """Settings, of which one in so many is something else; None where they are refused."""
    given = {
        name: maybe_spoilt(draw, draw(st.sampled_from(values)), spoilt)
        for name, values in SETTINGS.items()
        if draw(st.booleans())
    }
    given.setdefault("max_iter", 3)
    attack = attempt("|".join(SETTINGS), DAG, **given)
    if attack is not None:
        assert {name: getattr(attack, name) for name in given} == given
    return attack


def some_images(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    images = torch.rand(shape, generator=generator(draw(SEEDS))).to(dtype)
    if images.numel() and one_in(draw, 12):
        where = draw(st.integers(0, images.numel() - 1))
        images.view(-1)[where] = draw(st.sampled_from((NAN, INF, 1.5, -0.5)))
    return images


def some_labels(draw: st.DrawFn, shape: tuple[int, ...], classes: int = 4) -> Tensor:
    rng = generator(draw(SEEDS))
    drawn = torch.randint(0, classes, shape, generator=rng)
    drawn[torch.rand(shape, generator=rng) < 0.1] = 255
    if drawn.numel() and one_in(draw, 12):
        drawn.view(-1)[0] = draw(st.sampled_from((-1, -2, 4, 77)))
    return drawn.to(draw(st.sampled_from(LABEL_DTYPES)))


def some_aim(draw: st.DrawFn, own: Tensor) -> Any:
    kinds = (None, "permutation", "random", "runner-up", "given")
    kind = draw(st.sampled_from(kinds))
    return some_labels(draw, tuple(own.shape)) if kind == "given" else kind


def some_call(draw: st.DrawFn) -> tuple[nn.Module, dict[str, Any]]:
    """A network, and the arguments of a call."""
    stride = draw(st.sampled_from((1, 1, 2)))
    model = Linear(stride=stride, fault=draw(st.sampled_from(FAULTS)))
    count, side = draw(st.sampled_from((0, 1, 2, 3))), draw(st.sampled_from((2, 4, 6)))
    dtype = draw(st.sampled_from((torch.float32, torch.float32, torch.float64, torch.bfloat16)))
    images = some_images(draw, (count, 3, side, side), dtype)
    own = some_labels(draw, (count, side, side))
    start = draw(st.sampled_from((None, None, images, (images + 0.01).clamp(0, 1))))
    given = {
        "images": images,
        "labels": own,
        "adversarial_labels": some_aim(draw, own),
        "generator": some_generator(draw),
        "at": None,
        "start": start,
    }
    return model, {name: maybe_spoilt(draw, value, 30) for name, value in given.items()}


def assert_sound(attack: DAG, adversarial: Tensor, images: Tensor, iterations: Tensor) -> None:
    """Finite, inside the bounds, and no farther from the images than the updates reach."""
    assert adversarial.shape == images.shape
    assert bool(adversarial.isfinite().all())
    if not images.numel():
        return
    if attack.bounds is not None:
        low, high = images.new_tensor(attack.bounds).tolist()
        assert low <= float(adversarial.min())
        assert float(adversarial.max()) <= high
    away = (adversarial - images).double().abs().flatten(1).amax(1)
    rounding = 4 * torch.finfo(images.dtype).eps * float(images.abs().max() + away.max())
    assert bool((away <= attack.gamma * iterations.double() * (1 + 1e-5) + 0.011 + rounding).all())
    if attack.epsilon is not None:
        assert float(away.max()) <= attack.epsilon * (1 + 1e-5) + rounding


@given(data=st.data())
def test_attack(data: st.DataObject) -> None:
    attack = some_attack(data.draw)
    if attack is None or attack.max_iter > 9:
        return
    model, given = some_call(data.draw)
    got = attempt(PIECES, attack, model, **given)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    if got is not None:
        assert_sound(attack, got.adversarial, given["images"], got.iterations)
        for n, status in enumerate(got.status):
            last = int(got.active[int(got.iterations[n]), n])
            assert (status == "converged") == (last <= attack.tolerance * int(got.targets[n]))
            assert (got.active[int(got.iterations[n]) + 1 :, n] == -1).all()


def some_samples(draw: st.DrawFn) -> list[Any]:
    made: list[Any] = []
    for key in range(draw(st.integers(0, 4))):
        side = draw(st.sampled_from((2, 4, 4)))
        own = some_labels(draw, (side, side))
        given = {
            "image": some_images(draw, (3, side, side), torch.float32),
            "labels": own,
            "adversarial_labels": some_aim(draw, own),
        }
        given = {name: maybe_spoilt(draw, value, 40) for name, value in given.items()}
        made.append(maybe_spoilt(draw, Sample(**given, key=key), 40))
    return made


@FEW
@given(data=st.data())
def test_stream(data: st.DataObject) -> None:
    attack = some_attack(data.draw, 60)
    if attack is None or attack.max_iter > 9:
        return
    model = Linear(
        stride=data.draw(st.sampled_from((1, 2))), fault=data.draw(st.sampled_from(FAULTS))
    )
    given = some_samples(data.draw)
    slots = maybe_spoilt(data.draw, data.draw(st.integers(1, 3)), 30)
    got: list[Any] = []
    done = attempt(
        PIECES,
        lambda: got.extend(attack.stream(model, given, slots, some_generator(data.draw))) or True,
    )
    assert model.training
    keys = [result.key for result in got]
    assert len(set(keys)) == len(keys)
    assert not done or sorted(keys) == list(range(len(given)))
    for result in got:
        image = given[result.key].image[None]
        assert_sound(attack, result.adversarial, image, result.iterations)


@given(data=st.data())
def test_joint_attack(data: st.DataObject) -> None:
    attack = some_attack(data.draw, 60)
    if attack is None or attack.max_iter > 9:
        return
    count, side = data.draw(st.sampled_from((0, 1, 2))), data.draw(st.sampled_from((2, 4)))
    images = some_images(data.draw, (count, 3, side, side), torch.float32)
    parts = []
    for stride in data.draw(st.lists(st.sampled_from((1, 2)), max_size=2)):
        model = Linear(stride=stride, fault=data.draw(st.sampled_from(FAULTS)))
        own = some_labels(data.draw, (count, side, side))
        kind = some_aim(data.draw, own)
        aim = "permutation" if kind is None else kind
        goal = data.draw(st.sampled_from((None, "leave", "reach")))
        given = (maybe_spoilt(data.draw, value, 40) for value in (model, own, aim, None, goal))
        parts.append(maybe_spoilt(data.draw, Part(*given), 40))
    images = maybe_spoilt(data.draw, images, 30)
    source = some_generator(data.draw)
    got = attempt(PIECES, joint_attack, attack, maybe_spoilt(data.draw, parts, 40), images, source)
    if got is not None:
        assert_sound(attack, got.adversarial, images, got.iterations)


@given(data=st.data())
def test_universal_perturbation(data: st.DataObject) -> None:
    attack = some_attack(data.draw, 60)
    if attack is None or attack.max_iter > 9:
        return
    model = Linear(
        stride=data.draw(st.sampled_from((1, 2))), fault=data.draw(st.sampled_from(FAULTS))
    )
    given = some_samples(data.draw)
    got = attempt(
        PIECES,
        universal_perturbation,
        attack,
        model,
        maybe_spoilt(data.draw, given, 40),
        maybe_spoilt(data.draw, data.draw(st.integers(1, 3)), 30),
        some_generator(data.draw),
    )
    if got is not None:
        # Samples that no update came to are not read: they may be of any size, or none.
        images = [sample.image for sample in given if isinstance(sample, Sample)]
        sides = {
            image.shape[1] for image in images if isinstance(image, Tensor) and image.dim() > 1
        }
        side = got.perturbation.shape[2]
        assert got.perturbation.shape == (1, 3, side, side)
        assert side in sides
        assert bool(got.perturbation.isfinite().all())
        assert float(got.perturbation.abs().max()) <= attack.gamma * int(got.iterations) * 1.001
        assert len(got.active) > got.iterations
        done = got.active[: int(got.iterations) + 1, 0]
        assert bool((done >= 0).all())
        assert bool((got.active[int(got.iterations) + 1 :] == -1).all())


# --- files


def encoded(mode: str, format: str, **options: Any) -> bytes:
    """A small image as a file."""
    rng = np.random.default_rng(0)
    kind = np.uint16 if mode == "I;16" else np.uint8
    shape = (7, 9) if mode in ("L", "I;16") else (7, 9, 3)
    image = Image.fromarray(rng.integers(0, 256, shape, dtype=kind))
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, format=format, **options)
    return buffer.getvalue()


ORIENTED = Image.Exif()
ORIENTED[0x0112] = 6
SECOND = Image.new("RGB", (9, 7))
FILES = [
    *(encoded(mode, "PNG") for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")),
    encoded("P", "PNG", transparency=b"\x00\x80\xff"),
    *(encoded(mode, "JPEG") for mode in ("RGB", "L", "CMYK")),
    encoded("RGB", "JPEG", exif=ORIENTED),
    *(encoded("RGB", f, save_all=True, append_images=[SECOND]) for f in ("TIFF", "GIF", "PNG")),
    *(encoded("RGB", format) for format in ("BMP", "GIF", "TIFF", "WEBP", "PPM", "TGA")),
]


def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes that were flipped, cut, repeated or overwritten in a few places."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        if not changed:
            break
        at = draw(st.integers(0, len(changed) - 1))
        match draw(st.sampled_from(("flip", "flip", "set", "cut", "repeat", "insert"))):
            case "flip":
                changed[at] ^= 1 << draw(st.integers(0, 7))
            case "set":
                changed[at] = draw(st.sampled_from((0, 1, 127, 128, 255)))
            case "cut":
                del changed[at : at + draw(st.sampled_from((1, 4, 10**6)))]
            case "repeat":
                changed[at:at] = changed[at : at + 12]
            case "insert":
                changed[at:at] = draw(st.binary(max_size=6))
    return bytes(changed)


@pytest.mark.filterwarnings("ignore:::PIL")  # what Pillow thinks of a file
@pytest.mark.parametrize("read", [read_image, read_label_map])
@given(data=st.data())
def test_images(
    read: Callable[[Path], Tensor], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.png"
    path.write_bytes(mutated(data.draw, data.draw(st.sampled_from(FILES))))
    got = attempt("fuzzed.png", read, path)
    if got is None:
        return
    assert frame_count(path) >= 1
    assert min(got.shape) >= 1
    if read is read_image:
        assert got.dtype == torch.float32
        assert got.shape[0] == 3
        assert 0 <= float(got.min()) <= float(got.max()) <= 1
    else:
        assert got.dtype == torch.int32
        assert got.dim() == 2
        assert int(got.min()) >= IGNORE


VOC = b"""<?xml version="1.0" encoding="utf-8"?>
<annotation><size><width>40</width><height>30</height></size>
<object><name>cat</name><difficult>1</difficult>
<bndbox><xmin>1</xmin><ymin>2.5</ymin><xmax>40</xmax><ymax>30</ymax></bndbox></object>
<object><name>dog</name>
<bndbox><xmin>7</xmin><ymin>3</ymin><xmax>9</xmax><ymax>4</ymax></bndbox></object>
</annotation>"""


def assert_boxes(got: tuple[Tensor, Tensor, Tensor], height: int, width: int) -> None:
    boxes, classes, flags = got
    assert (boxes.dtype, classes.dtype, flags.dtype) == (torch.float32, torch.int64, torch.bool)
    assert boxes.shape == (len(classes), 4)
    assert len(flags) == len(classes)
    assert bool((boxes >= 0).all())
    assert bool((boxes <= boxes.new_tensor([width, height, width, height])).all())
    assert bool((boxes[:, :2] < boxes[:, 2:]).all())


@given(data=st.data())
def test_voc_boxes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.xml"
    content = VOC
    if data.draw(st.booleans()):
        old = data.draw(
            st.sampled_from((b"utf-8", b"2.5", b"40</xmax>", b"cat", b"1</diff", b">7<"))
        )
        new = data.draw(
            st.sampled_from((b"ascii", b"utf-7", b"nonsense", b"utf-16", b"nan", b"1e999", b"-0"))
            | st.sampled_from((b"9" * 5000, b"", b"&amp;", b"&x;", b"<a/>", "é".encode(), b"\xff"))
        )
        content = content.replace(old, new, 1)
    path.write_bytes(mutated(data.draw, content))
    got = attempt("fuzzed.xml", read_voc_boxes, path, (30, 40))
    if got is not None:
        assert_boxes(got, 30, 40)
        assert set(got[1].tolist()) <= set(OBJECTS.values())


COCO = {
    "images": [
        {"id": 1, "file_name": "a.jpg", "height": 30, "width": 40},
        {"id": 2, "file_name": "b.jpg"},
    ],
    "annotations": [
        {"id": 5, "image_id": 1, "category_id": 3, "bbox": [1, 2.5, 10, 20], "iscrowd": 0},
        {"id": 6, "image_id": 2, "category_id": 9, "bbox": [-5, 0, 50, 3]},
    ],
    "categories": [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}],
}
JSON = st.sampled_from((None, True, 0, -1, 3, 2.5, 1e308, NAN, INF, 10**400, 2**70, "", "3", "cat"))
JSON = JSON | st.sampled_from(([], [1, 2, 3, 4], [[]], {}, {"id": []}, "1234", [1e308] * 4))


def spoil_json(draw: st.DrawFn, value: Any) -> Any:
    """One place of a document set to something else, or left out."""
    if isinstance(value, (list, dict)) and value and draw(st.integers(0, 4)):
        changed = dict(value) if isinstance(value, dict) else list(value)
        key = draw(st.sampled_from(sorted(value))) if isinstance(value, dict) else None
        at = draw(st.integers(0, len(value) - 1)) if key is None else key
        if one_in(draw, 8):
            del changed[at]
        else:
            changed[at] = spoil_json(draw, value[at])
        return changed
    return draw(JSON)


@pytest.mark.parametrize("classes", [None, {"cat": 1, "dog": 2}], ids=["ids", "names"])
@given(data=st.data())
def test_coco_boxes(
    classes: dict[str, int] | None, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    document: Any = COCO
    for _ in range(data.draw(st.integers(0, 2))):
        document = spoil_json(data.draw, document)
    content = json.dumps(document).encode()
    if one_in(data.draw, 3):
        content = mutated(data.draw, content)
    if one_in(data.draw, 50):
        content = b"[" * 100_000
    path.write_bytes(content)
    known = attempt("fuzzed.json", CocoBoxes, path, classes)
    for name in () if known is None else ("a.jpg", "b.jpg", "c.jpg"):
        got = attempt("fuzzed.json", known, name, (30, 40))
        if got is not None:
            assert_boxes(got, 30, 40)
            assert classes is None or set(got[1].tolist()) <= set(classes.values())
