"""The checks of an evaluation: each flags what it is for, and nothing that is sound."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import generator
from torch import Tensor, nn

from dagcore import APGD, PGD, zoo
from dagcore.attacks import CosPGD
from dagcore.attacks.steps import ProjectedStep
from dagcore.data import Scenes
from dagcore.evaluation.validity import check

REAL = Path(__file__).parents[2] / "shared" / "real"
NAMES = (
    "labels-fit",
    "stochastic-forward",
    "zero-gradient",
    "nan-gradient",
    "constant-gradient",
    "non-differentiable",
    "unbounded-attack",
    "no-fall-with-epsilon",
    "not-at-plateau",
    "one-step-stronger",
    "noise-as-strong",
    "planted-example",
    "transfer-stronger",
)
EPSILON = 8 / 255


@pytest.fixture(autouse=True)
def one_thread():
    """The networks are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Small(nn.Module):
    """A random network, with a module before, in the middle of and behind it."""

    def __init__(self, *, before=None, inside=None, behind=None):
        super().__init__()
        rng = generator(0)
        self.before = before or nn.Identity()
        self.features = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1)
        )
        self.inside = inside or nn.Identity()
        self.classify = nn.Conv2d(12, 5, 1)
        self.behind = behind or nn.Identity()
        with torch.no_grad():
            for p in self.parameters():
                scale = 1.4 / p[0].numel() ** 0.5 if p.dim() > 1 else 0.1
                p.copy_(scale * torch.randn(p.shape, generator=rng))

    def forward(self, images):
        features = self.features(4 * (self.before(images) - 0.5))
        return self.behind(self.classify(F.relu(self.inside(features))))


class Rounded(nn.Module):
    """Values in steps of 1/32: their gradient is zero."""

    def forward(self, x):
        return torch.round(32 * x) / 32


class Nested(nn.Module):
    """A module inside of which another one rounds."""

    def __init__(self):
        super().__init__()
        self.quantise = Rounded()

    def forward(self, x):
        return self.quantise(x) + 0.0


class Shortcut(Nested):
    """Gradients go past the module that rounds."""

    def forward(self, x):
        return x + self.quantise(x)


class Detached(nn.Module):
    def forward(self, x):
        return x.detach()


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.02 * torch.randn_like(x)


class DropoutLeftOn(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.2, training=True)


class RootAtZero(nn.Module):
    """The identity, with an infinite derivative times zero on the way."""

    def forward(self, x):
        return x + 0 * (x - x).sqrt()


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


class Saturated(nn.Module):
    """A sigmoid that is 0 or 1 everywhere."""

    def forward(self, x):
        return torch.sigmoid(1e6 * x)


class _Constant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        pattern = torch.randn(gradient.shape[1:], generator=generator(0))
        return pattern.expand_as(gradient) * gradient.abs().mean()


class ConstantGradient(nn.Module):
    def forward(self, x):
        return _Constant.apply(x)


class InPlace(nn.Module):
    """Writes into its input, and hands it on twice."""

    def forward(self, x):
        return {"out": x.mul_(2), "aux": (x,)}


@pytest.fixture(scope="module")
def images():
    coarse = torch.rand(2, 3, 4, 4, generator=generator(1))
    return list(F.interpolate(coarse, (32, 32), mode="bilinear", align_corners=True))


@pytest.fixture(scope="module")
def labels(images):
    """What the network sees without anything broken in it."""
    with torch.no_grad():
        return list(Small()(torch.stack(images)).argmax(1))


def found(victim, images, labels, **settings):
    """Findings by name, after a look at their form."""
    findings = check(victim, images, labels, **settings)
    assert tuple(one.name for one in findings) == NAMES
    json.dumps([dataclasses.asdict(one) for one in findings], allow_nan=False)
    for one in findings:
        assert one.verdict in ("passed", "flagged", "skipped")
        assert one.text
    return {one.name: one for one in findings}


def flagged(findings):
    return {name for name, one in findings.items() if one.verdict == "flagged"}


@pytest.mark.parametrize("epsilon", [1 / 255, EPSILON])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_nothing_is_flagged_of_a_sound_network(images, labels, norm, epsilon):
    epsilon = epsilon if norm == "linf" else epsilon * 55  # sqrt(3 * 32 * 32)
    findings = found(Small(), images, labels, norm=norm, epsilon=epsilon, surrogate=Small())
    assert not flagged(findings)
    assert all(one.verdict == "passed" for one in findings.values())
    assert findings["labels-fit"].figures["correct"] == 100
    assert findings["planted-example"].figures["found by noise"] == 0


def test_modules_that_work_in_place_and_return_several_tensors(images, labels):
    victim = Small(inside=nn.ReLU(inplace=True), behind=InPlace())
    assert not flagged(found(victim, images, labels))


def test_what_it_costs(images, labels):
    """Of a network that no attack fools, so that none is done early."""
    passes = 0

    def victim(x):
        nonlocal passes
        passes += len(x)
        right = F.one_hot(torch.zeros(len(x), 32, 32, dtype=torch.int64), 5).movedim(3, 1)
        return right + 1e-3 * network(x)

    network, steps = Small(), 20
    found(victim, images, [torch.zeros_like(one) for one in labels], surrogate=victim)
    assert 7 * steps < passes / len(images) <= 10 * steps + 30


@pytest.mark.parametrize("name", ["FCN-Alex", "DL-VGG"])
def test_nothing_is_flagged_of_the_zoo(name):
    scenes = list(Scenes("07", "test", count=2))
    findings = found(
        zoo.load(name),
        [scene.image for scene in scenes],
        [scene.mask for scene in scenes],
        epsilon=4 / 255,
        surrogate=zoo.load("FCN-VGG"),
    )
    assert not flagged(findings)


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/real is not there")
def test_nothing_is_flagged_of_a_real_network(monkeypatch):
    from PIL import Image

    monkeypatch.syspath_prepend(str(REAL))
    import networks

    try:
        model = networks.load_deeplab(REAL / "deeplab_voc.safetensors")
    finally:
        del sys.modules["networks"]
    image, labels = (
        np.array(Image.open(REAL / "photos" / f"bird{kind}")) for kind in (".png", ".labels.png")
    )
    image = torch.from_numpy(image[::2, ::2]).permute(2, 0, 1).float() / 255
    labels = torch.from_numpy(labels[::2, ::2])
    findings = found(model, [image[:, :161, :161]], [labels[:161, :161]], epsilon=4 / 255)
    assert not flagged(findings)


def test_labels_that_do_not_fit(images, labels):
    findings = found(Small(), images, [(one + 1) % 5 for one in labels])
    assert "labels-fit" in flagged(findings)
    assert "numbered from 1" in findings["labels-fit"].text
    assert findings["labels-fit"].figures["correct if one less"] > 50


@pytest.mark.parametrize("part", ["before", "inside", "behind"])
@pytest.mark.parametrize("module", [Noise, DropoutLeftOn])
def test_random_parts_are_named(images, labels, module, part):
    findings = found(Small(**{part: module()}), images, labels)
    one = findings["stochastic-forward"]
    assert one.verdict == "flagged"
    assert one.figures["modules"] == [f"{part} ({module.__name__})"]
    assert f"{part} ({module.__name__})" in one.text


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"before": Rounded()}, "before (Rounded)"),
        ({"inside": Rounded()}, "inside (Rounded)"),
        ({"inside": Nested()}, "inside.quantise (Rounded)"),
        ({"inside": Shortcut()}, "inside.quantise (Rounded)"),
        ({"inside": Detached()}, "inside (Detached)"),
        ({"behind": nn.Sequential(nn.Identity(), Detached())}, "behind.1 (Detached)"),
    ],
)
def test_parts_without_a_gradient_are_named(images, labels, settings, named):
    findings = found(Small(**settings), images, labels)
    assert findings["non-differentiable"].verdict == "flagged"
    assert findings["non-differentiable"].figures["modules"] == [named]
    assert named in findings["non-differentiable"].text


def test_rounding_is_noticed_by_everything_that_needs_gradients(images, labels):
    findings = found(Small(before=Rounded()), images, labels, surrogate=Small())
    assert flagged(findings) >= {
        "zero-gradient",
        "non-differentiable",
        "unbounded-attack",
        "noise-as-strong",
        "planted-example",
        "transfer-stronger",
    }
    assert findings["zero-gradient"].figures["images"] == 100


def test_a_detached_network_has_its_attacks_skipped(images, labels):
    findings = found(Small(behind=Detached()), images, labels)
    assert flagged(findings) == {"non-differentiable"}
    assert findings["planted-example"].verdict == "skipped"
    assert "non-differentiable" in findings["planted-example"].text


def test_a_function_without_a_gradient(images, labels):
    network = Small()
    findings = found(lambda x: network(x).detach(), images, labels)
    assert flagged(findings) == {"non-differentiable"}
    assert findings["non-differentiable"].figures["modules"] == []
    assert not flagged(found(network.forward, images, labels))


@pytest.mark.parametrize(
    "settings", [{"behind": Times(1e6)}, {"before": Saturated()}], ids=["scores", "images"]
)
def test_saturation(images, labels, settings):
    victim = Small(**settings)
    with torch.no_grad():
        labels = list(victim(torch.stack(images)).argmax(1))
    assert "zero-gradient" in flagged(found(victim, images, labels))


def test_a_gradient_that_is_not_a_number(images, labels):
    findings = found(Small(before=RootAtZero()), images, labels)
    assert "nan-gradient" in flagged(findings)
    assert findings["nan-gradient"].figures == {"images": 100, "pixels": 100}
    assert findings["constant-gradient"].verdict == "skipped"


def test_a_constant_gradient(images, labels):
    findings = found(Small(before=ConstantGradient()), images, labels)
    assert "constant-gradient" in flagged(findings)
    assert findings["constant-gradient"].figures["within ball"] == pytest.approx(1)


def test_an_attack_with_tiny_steps(images, labels):
    attack = PGD(epsilon=EPSILON, alpha=1e-6, steps=20)
    assert flagged(found(Small(), images, labels, attack=attack)) >= {
        "unbounded-attack",
        "one-step-stronger",
        "noise-as-strong",
        "planted-example",
    }


@pytest.mark.parametrize("epsilon", [1 / 255, 2 * EPSILON])
def test_an_attack_that_has_not_come_to_its_end(images, labels, epsilon):
    attack = CosPGD(alpha=epsilon / 10, steps=5, random_start=False)
    findings = found(Small(), images, labels, epsilon=epsilon, attack=attack)
    assert "not-at-plateau" in flagged(findings)


def test_an_attack_whose_steps_are_far_too_large(images, labels):
    attack = CosPGD(alpha=10 * EPSILON, steps=20)
    assert "unbounded-attack" in flagged(found(Small(), images, labels, attack=attack))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeafToEpsilon(CosPGD):
    """Moves in the same ball whatever the radius."""

    def random_point(self, image: Tensor, seed: int, run: int) -> Tensor | None:
        return None

    def step(self):
        return ProjectedStep("linf", 0.002, 4 / 255, self.bounds)


def test_an_attack_that_does_not_use_the_ball(images, labels):
    findings = found(Small(), images, labels, attack=DeafToEpsilon(steps=20))
    assert flagged(findings) >= {"no-fall-with-epsilon", "unbounded-attack"}


def test_an_attack_that_goes_down(images, labels):
    attack = PGD(
        epsilon=EPSILON, steps=10, loss=lambda z, y: -F.cross_entropy(z, y, reduction="none")
    )
    findings = found(Small(), images, labels, attack=attack)
    assert flagged(findings) >= {"unbounded-attack", "one-step-stronger", "noise-as-strong"}


@pytest.mark.parametrize(
    "attack",
    [
        CosPGD(steps=20),
        APGD(loss="jensen-shannon", steps=20),
        APGD(loss="masked-cross-entropy", track="cross-entropy", radii="shrinking", steps=60),
    ],
    ids=["cospgd", "apgd", "sea"],
)
def test_sound_attacks(images, labels, attack):
    assert not flagged(found(Small(), images, labels, attack=attack))


def test_the_same_call_has_the_same_findings_and_leaves_everything_as_it_was(images, labels):
    victim = Small(before=Noise()).train()
    labels = [*labels[:1], labels[1][:16]]
    images = [*images[:1], images[1][:, :16]]
    before = torch.get_rng_state()
    first = check(victim, images, labels, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert check(victim, images, labels, seed=3) == first
    assert check(victim, images, labels, seed=4) != first
    assert all(module.training for module in victim.modules())
    assert all(p.requires_grad and p.grad is None for p in victim.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in victim.modules())


def test_ignored_pixels_do_not_count(images, labels):
    wrong = [
        torch.where(torch.rand(one.shape, generator=generator(0)) < 0.9, 255, one) for one in labels
    ]
    assert found(Small(), images, wrong)["labels-fit"].figures["correct"] == 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"victim": 3}, "victim must be callable, got int"),
        ({"surrogate": 3}, "surrogate must be callable, got int"),
        ({"images": []}, "images must be a sequence of at least one tensor, got an empty list"),
        (
            {"labels": [torch.zeros(32, 32, dtype=torch.int64)]},
            "one map for each of 2 images, got 1",
        ),
        ({"images": [torch.zeros(1, 3, 8, 8)] * 2}, r"images\[0\] must have shape \(3, H, W\)"),
        ({"images": [torch.full((3, 32, 32), 2.0)] * 2}, r"images\[0\] must lie within bounds"),
        ({"labels": [torch.zeros(32, dtype=torch.int64)] * 2}, r"labels\[0\] must have shape"),
        ({"labels": [torch.zeros(32, 32)] * 2}, r"labels\[0\] must be"),
        ({"labels": [torch.full((32, 32), 255)] * 2}, "a pixel that counts"),
        ({"labels": [torch.full((32, 32), 7)] * 2}, "labels must lie in"),
        ({"epsilon": 0}, "epsilon must be a finite number above 0"),
        ({"norm": "l1"}, "norm must be"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"attack": "pgd"}, "attack must be an attack within a ball"),
    ],
)
def test_bad_input(images, labels, change, message):
    given = {"victim": Small(), "images": images, "labels": labels, **change}
    with pytest.raises((TypeError, ValueError), match=message):
        check(given.pop("victim"), given.pop("images"), given.pop("labels"), **given)
