"""Defences: what they do, how gradients pass them, and that every attack takes them."""

import io
import runpy
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import generator
from torch import nn
from torch.nn import functional as F

import dagcore
from dagcore import DAG, PGD, CosPGD, defences, victims, zoo
from dagcore.data import Scenes
from dagcore.defences import draws, training
from dagcore.defences.codec import STRAIGHT, Jpeg
from dagcore.defences.defended import Defended
from dagcore.defences.transforms import Fixed, ResizePad, StraightThrough
from dagcore.evaluation.validity import check

SIZE = (40, 56)


class Small(nn.Module):
    """Scores of 5 classes at an eighth of the size, or at the full size."""

    def __init__(self, stride=8):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 5, stride=stride, padding=2)
        self.last = nn.Conv2d(8, 5, 3, padding=1)

    def forward(self, images):
        return self.last(self.first(images).relu())


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Small(1).eval()


def images(count=3):
    return torch.rand(count, 3, *SIZE, generator=generator(1))


WRAPPED = {
    "jpeg": lambda v: defences.jpeg(v, 60),
    "bits": lambda v: defences.bit_depth(v, 3),
    "median": defences.median,
    "gaussian": lambda v: defences.gaussian(v, 0.8),
    "noise": lambda v: defences.noise(v, 0.05),
    "resize": lambda v: defences.resize_pad(v, 0.7),
    "augmented": defences.augmented,
    "several": lambda v: defences.jpeg(defences.resize_pad(defences.noise(v), 0.9), 60),
}


def test_jpeg_is_the_file(network):
    x = images(2)
    seen = []
    defences.jpeg(lambda given: (seen.append(given), network(given))[1], 55)(x)
    for one, found in zip(x, seen[0], strict=True):
        buffer = io.BytesIO()
        pixels = (one * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=55)
        read = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)
        assert torch.equal((found * 255).round().byte(), read)
        assert (found - one).abs().max() > 0.05


def test_bits_median_and_blur_are_what_they_say(network):
    seen = {}

    def keeping(name):
        return lambda given: (seen.update({name: given}), network(given))[1]

    x = images(1)
    for name in ("bits", "median", "gaussian"):
        WRAPPED[name](keeping(name))(x)
    assert torch.equal(seen["bits"], (x * 7).round() / 7)
    inner = np.pad(x[0].numpy(), ((0, 0), (1, 1), (1, 1)), mode="reflect")
    for c, row, column in ((0, 0, 0), (1, 20, 30), (2, 39, 55)):
        window = inner[c, row : row + 3, column : column + 3]
        assert float(seen["median"][0, c, row, column]) == statistics.median(window.ravel())
    weights = torch.exp(-(torch.arange(-2.0, 3.0) ** 2) / (2 * 0.8**2))
    weights /= weights.sum()
    padded = F.pad(x, (2, 2, 2, 2), mode="reflect")
    blurred = F.conv2d(
        padded, (weights[:, None] * weights).expand(3, 1, 5, 5).contiguous(), groups=3
    )
    torch.testing.assert_close(seen["gaussian"], blurred, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "how"), [("jpeg", "through a model of the file (BPDA)"), ("bits", "straight-through")]
)
def test_rounding_has_the_gradient_of_a_stand_in_at_the_transformed_image(network, kind, how):
    defended, x = WRAPPED[kind](network), images().requires_grad_()
    assert how in defended.gradient
    defended(x).square().sum().backward()
    (view,) = defended.views
    moved = view.transformed(x.detach()).requires_grad_()
    network(moved).square().sum().backward()
    stand_in = view.model if kind == "jpeg" else lambda given: given
    leaf = x.detach().requires_grad_()
    stand_in(leaf).backward(moved.grad)
    torch.testing.assert_close(x.grad, leaf.grad)
    assert torch.equal(defended(x), network(moved))


@pytest.mark.parametrize("quality", [20, 75, 95])
@pytest.mark.parametrize("size", [(48, 64), (37, 21)])
def test_the_model_of_a_jpeg_is_close_to_the_file(quality, size):
    x = torch.stack([scene.image for scene in Scenes("07", "test", count=2)])
    x = x[..., : size[0], : size[1]]
    jpeg = Jpeg(quality)
    off = 255 * (jpeg.model(x) - jpeg.transformed(x))
    lost = 255 * (x - jpeg.transformed(x))
    assert off.abs().mean() < 2  # levels: samples are rounded too
    assert off.square().mean() < lost.square().mean() / 8


def test_the_gradient_of_the_model_of_a_jpeg():
    jpeg = Jpeg(50)
    x = torch.full((1, 3, 16, 16), 132.5 / 255, dtype=torch.float64)
    k = torch.arange(16, dtype=torch.float64) % 8
    wave = torch.cos(torch.pi / 16 * 7 * (2 * k + 1))
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    # The mean of a block is (132.5 - 128) * 8 / 16 = 2.25 steps, so the slope of the cube is
    # 3 * 0.25^2. The file drops the finest wave, where that slope is 0.
    slopes = (STRAIGHT + (1 - STRAIGHT) * 3 / 16, STRAIGHT)
    luma = weights.view(3, 1, 1)
    for pattern, slope in zip((torch.ones(16, 16), wave.expand(16, 16)), slopes, strict=True):
        leaf = x.clone().requires_grad_()
        (jpeg.model(leaf) * luma * pattern).sum().backward()
        torch.testing.assert_close(leaf.grad[0], slope * luma * pattern, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_gradient_of_a_jpeg_in_other_precision(dtype):
    x = torch.stack([scene.image for scene in Scenes("07", "test", count=2)]).to(dtype)
    found = []
    for autocast in (False, True):
        for kind in (dtype, torch.float32):
            leaf = x.detach().to(kind).requires_grad_()
            with torch.autocast("cpu", enabled=autocast):
                made = Jpeg(75)(leaf, torch.zeros(2, dtype=torch.int64))
            assert made.dtype == kind
            made.sum().backward()
            found.append(leaf.grad.double())
    for gradient in found:
        torch.testing.assert_close(gradient, found[1], rtol=2e-2, atol=2e-2)


def test_images_that_were_jpegs_have_a_gradient():
    jpeg, x = Jpeg(75), torch.full((1, 3, 16, 16), 128 / 255)
    assert torch.equal(jpeg.transformed(x), x)
    leaf = x.clone().requires_grad_()
    jpeg(leaf, torch.zeros(1, dtype=torch.int64)).sum().backward()
    assert (leaf.grad > 0.001).all()


def test_an_attack_through_the_model_of_a_jpeg_is_stronger_than_straight_through():
    network = zoo.load("DL-VGG")
    defended = defences.jpeg(network)

    class Straight(StraightThrough):
        transformed = staticmethod(defended.views[0].transformed)

        def __str__(self):
            return "JPEG"

    plain = Defended(network, [Straight()])
    scene = Scenes("07", "test", count=1, first=3000)[0]
    x, labels = scene.image[None], scene.mask[None].long()
    objects = labels.masked_fill(labels == 0, 255)
    attack = CosPGD(epsilon=2 / 255, alpha=1 / 255, steps=10, levels=256)
    left = []
    for victim in (defended, plain):
        made = attack(victim, x, labels, generator=generator(0)).adversarial
        left.append(int(attack.count_active(defended, made, objects, "untargeted")))
    assert left[1] > 500
    assert left[0] < left[1] / 10


def test_what_a_detector_finds_in_the_padding_is_left_out(detector):
    image = images(1)
    boxes = torch.tensor([[1.0, 1, 20, 20], [0, 0, 3, 2], [30, 20, 50, 38], [54, 0, 56, 40]])
    labels, seen = torch.tensor([1, 2, 3, 4]), torch.tensor([0.9, 0.8, 0.7, 0.6])

    class Finds(type(detector)):
        def detect(self, moved):
            return [{"boxes": boxes, "labels": labels, "scores": seen}]

        def candidates(self, moved, nms_threshold, max_proposals):
            return [(boxes, seen[:, None].expand(4, 5))]

    defended = defences.resize_pad(Finds(detector.network, detector.classes), 0.7)
    view, given, keys, _ = next(defended.seen(image))
    back = view.boxes(boxes[None], given, keys, back=True)[0]
    left, top, right, bottom = back.unbind(1)
    inside = (right > 0) & (bottom > 0) & (left < SIZE[1]) & (top < SIZE[0])
    assert 0 < inside.sum() < 4
    (found,) = defended.detect(image)
    assert torch.equal(found["labels"], labels[inside])
    assert torch.equal(found["scores"], seen[inside])
    assert (found["boxes"][:, :2] < found["boxes"][:, 2:]).all()
    ((kept, scores),) = defended.candidates(image, 0.9, 10)
    assert torch.equal(kept, found["boxes"])
    assert torch.equal(scores[:, 0], seen[inside])


def test_a_detector_without_targets_has_scores_of_every_draw(detector):
    defended = defences.noise(detector).adaptive(3)
    boxes = torch.zeros(1, 0, 4)
    assert defended(images(1), boxes).shape == (1, 5, 0)


@pytest.mark.parametrize("kind", ["median", "gaussian", "noise", "resize", "augmented"])
def test_exact_gradients(kind):
    torch.manual_seed(0)
    network = Small(1).double().eval()
    defended, x = WRAPPED[kind](network), images(1).double()[:, :, :12, :14]
    assert "exact" in defended.gradient
    direction = torch.randn(x.shape, generator=generator(2), dtype=torch.float64)
    # The draws follow from the image in float32, so that a step too small for it moves none.
    step = 1e-10
    x = (x.float().double() * 0.9 + 0.05).float().double()
    leaf = x.clone().requires_grad_()
    defended(leaf).square().mean().backward()
    with torch.no_grad():
        ends = [defended(x + sign * step * direction).square().mean() for sign in (1, -1)]
    numeric = float(ends[0] - ends[1]) / (2 * step)
    assert numeric == pytest.approx(float((leaf.grad * direction).sum()), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("kind", WRAPPED)
def test_an_image_alone_and_in_company(network, kind):
    defended, x = WRAPPED[kind](network), images(4)
    with torch.no_grad():
        together = defended(x)
        for k in (2, 0, 3):
            torch.testing.assert_close(defended(x[k : k + 1])[0], together[k], rtol=1e-4, atol=1e-5)
        assert torch.equal(defended(x), together)  # nothing is kept from call to call
    assert together.shape == (4, 5, *SIZE)


@pytest.mark.parametrize("kind", ["noise", "resize", "several"])
def test_what_is_drawn(network, kind):
    """Another seed or pixel draws anew; an attacker's mean comes near the expectation."""
    defended, x = WRAPPED[kind](network), images(1)
    assert defended.random
    other = x.clone()
    other[0, 0, 0, 0] = (other[0, 0, 0, 0] + 0.5) % 1
    with torch.no_grad():
        own = defended(x)
        assert (defended(other) - own).abs().mean() > 1e-4
        few, many, rest = (
            defended.adaptive(draws, seed)(x) for draws, seed in ((1, 5), (64, 6), (64, 7))
        )
        assert not torch.equal(few, own)
        assert (many - rest).abs().mean() < 0.5 * (few - own).abs().mean()
    with pytest.raises(ValueError, match="seed must not be the defence's own, got 0"):
        defended.adaptive(4, seed=0)
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        defended.adaptive(0)
    assert defended.draws == 1
    assert "expected over 1 draw (EOT)" in defended.gradient
    assert "expected over 8 draws (EOT)" in defended.adaptive().gradient


def test_draws_are_uniform_normal_and_without_order():
    keys = draws.mixed(torch.arange(200))
    found = draws.uniform(keys, 500)
    assert 0 < found.min() < 1e-3
    assert 0.999 < found.max() < 1
    assert torch.histc(found, 10).div(10_000).sub(1).abs().max() < 0.05
    assert found[:, :-1].sub(0.5).mul(found[:, 1:].sub(0.5)).mean().abs() < 1e-3
    assert found[:-1].sub(0.5).mul(found[1:].sub(0.5)).mean().abs() < 1e-3
    normal = draws.normal(keys, 501)
    assert normal.shape == (200, 501)
    assert abs(float(normal.mean())) < 0.01
    assert float(normal.std()) == pytest.approx(1, abs=0.01)
    assert float(normal.pow(4).mean()) == pytest.approx(3, abs=0.1)
    # splitmix64 of the seed 0, as published.
    assert int(draws.mixed(torch.tensor(0))) & (2**64 - 1) == 0xE220A8397B1DCDAF
    x = images(2)
    assert draws.fingerprints(x).tolist() == [int(draws.fingerprints(x[k : k + 1])) for k in (0, 1)]
    assert int(draws.fingerprints(x[:1].flip(3))) != int(draws.fingerprints(x[:1]))
    zeros = torch.zeros(1, 3, 2, 2)
    assert int(draws.fingerprints(zeros)) == int(draws.fingerprints(-zeros))


@pytest.mark.parametrize("align_corners", [False, True])
def test_boxes_and_scores_follow(align_corners):
    """A spot of the image, its box and its score are in the same place before and after."""
    x = torch.zeros(2, 3, 64, 96)
    x[:, :, 20:36, 24:56] = 1
    box = torch.tensor([[[24.0, 20.0, 56.0, 36.0]]]).expand(2, 1, 4)
    keys = draws.mixed(torch.tensor([3, 4]))
    for view in (ResizePad(0.6), Fixed(0.75, True), Fixed(1.0, True)):
        moved = view(x, keys, align_corners)
        for k, one in enumerate(view.boxes(box, x, keys)):
            rows = (moved[k, 0] > 0.5).any(1).nonzero()
            columns = (moved[k, 0] > 0.5).any(0).nonzero()
            seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            torch.testing.assert_close(one[0], torch.stack(seen).float(), rtol=0, atol=1.5)
        back = view.boxes(view.boxes(box, x, keys), x, keys, back=True)
        torch.testing.assert_close(back, box, rtol=0, atol=1e-3)
        scores = F.interpolate(moved, (32, 48), mode="bilinear", align_corners=align_corners)
        restored = view.back(scores, x, keys, align_corners)
        inside = F.interpolate(restored, (64, 96), mode="bilinear", align_corners=align_corners)
        assert (inside[:, :, 23:33, 27:53] > 0.8).all()
        assert inside[:, :, :17].abs().max() < 0.2
        assert inside[:, :, :, :20].abs().max() < 0.2


def test_augmentation_averages_probabilities(network):
    defended, x = defended_of(network), images(2)
    with torch.no_grad():
        mirrored = network(x.flip(3)).flip(3)
        expected = (network(x).softmax(1) + mirrored.softmax(1)) / 2
        torch.testing.assert_close(defended(x).exp(), expected, rtol=1e-4, atol=1e-5)


def defended_of(network):
    return defences.augmented(network, scales=(1.0,))


ATTACKS = {
    "dag": lambda: DAG(max_iter=8),
    "pgd": lambda: PGD(steps=4),
    "apgd": lambda: dagcore.APGD(steps=5, radii="shrinking"),
    "levels": lambda: DAG(max_iter=6, levels=256),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("kind", ["jpeg", "several", "augmented"])
def test_every_attack_takes_a_defended_network(kind, attack):
    torch.manual_seed(0)
    defended = WRAPPED[kind](Small().eval()).adaptive(2)
    x = (images(2) * 255).round() / 255
    with torch.no_grad():
        labels = F.interpolate(defended(x), SIZE, mode="bilinear").argmax(1)
    result = ATTACKS[attack]()(defended, x, labels, generator=generator(3))
    assert (result.adversarial - x).abs().amax((1, 2, 3)).min() > 0
    assert (result.active[0] > result.left).all()  # fewer targets are right than before
    streamed = list(
        ATTACKS[attack]().stream(
            defended,
            [
                dagcore.Sample(x[k], labels[k], result.adversarial_labels[k], key=k, seed=k)
                for k in (0, 1)
                if attack == "dag"
            ],
            slots=1,
        )
    )
    for one in streamed:
        torch.testing.assert_close(
            one.adversarial[0], result.adversarial[one.key], rtol=0, atol=1e-4
        )


def test_validity_names_the_adaptive_form(network):
    """A random defence is flagged where one draw is attacked, and not where many are."""
    x = list(images(2))
    with torch.no_grad():
        labels = list(network(torch.stack(x)).argmax(1))

    def findings(victim):
        found = check(victim, x, labels, attack=PGD(steps=2, alpha=0.01))
        return {one.name: one for one in found}

    one = findings(WRAPPED["several"](network))
    assert one["stochastic-forward"].verdict == "flagged"
    assert "noise of 0.03: exact, expected over 1 draw (EOT)" in one["stochastic-forward"].text
    assert "attack what its method adaptive() gives" in one["stochastic-forward"].text
    assert (
        "JPEG of quality 60: through a model of the file (BPDA)" in one["non-differentiable"].text
    )
    many = findings(WRAPPED["several"](network).adaptive(4))
    assert many["stochastic-forward"].verdict == "passed"
    assert "expected over 4 draws (EOT)" in many["stochastic-forward"].text
    assert many["non-differentiable"].verdict == "passed"


def test_undefended_and_layers(network):
    defended = WRAPPED["several"](network)
    assert defended.undefended is network
    assert [str(one.views[0]) for one in defended.layers] == [
        "JPEG of quality 60",
        "resized at random to 0.9 to 1 and padded",
        "noise of 0.03",
    ]
    assert defended.gradient == (
        "JPEG of quality 60: through a model of the file (BPDA); "
        "resized at random to 0.9 to 1 and padded: exact, expected over 1 draw (EOT); "
        "noise of 0.03: exact, expected over 1 draw (EOT)"
    )
    assert [one.draws for one in defended.adaptive(3).layers] == [1, 3, 1]
    assert [one.seed for one in defended.adaptive(3).layers] == [0, 1, 1]
    assert [one.draws for one in defended.layers] == [1, 1, 1]
    assert "noise of 0.03: exact, expected over 1 draw (EOT)" in defended.adaptive(3).gradient
    assert not defences.jpeg(network).random


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    network = zoo.build("FR-ZF-07", num_classes=5, width=1 / 16, box_score_thresh=0.0).eval()
    return victims.detector(network, classes=["background", "a", "b", "c", "d"])


@pytest.mark.parametrize("kind", WRAPPED)
def test_detectors_are_defended(detector, kind):
    defended = WRAPPED[kind](detector)
    assert isinstance(defended, victims.Detector)
    scenes = list(Scenes("07", "test", count=2))
    x = torch.stack([scene.image for scene in scenes])
    boxes = torch.tensor([[[10.0, 10, 60, 70], [50, 20, 120, 90]]]).expand(2, 2, 4)
    with torch.no_grad():
        scores = defended(x, boxes)
        assert scores.shape == (2, 5, 2)
        torch.testing.assert_close(defended(x[1:], boxes[1:])[0], scores[1], rtol=1e-3, atol=1e-4)
        found = defended.detect(x)
    assert len(found) == 2
    for one in found:
        assert set(one) == {"boxes", "labels", "scores"}
        assert one["boxes"].min() >= 0
        assert (one["boxes"].amax(0)[2:] <= torch.tensor([160.0, 128.0])).all()
        assert (one["scores"].diff() <= 0).all()
    for boxes, own in defended.candidates(x, 0.7, 50):
        assert len(boxes) == len(own) > 0
        assert own.shape[1] == 5
    labels = torch.ones(2, 2, dtype=torch.int64)
    aims = torch.full_like(labels, 3)
    attack = DAG(max_iter=3)
    result = attack(defended.adaptive(2), x, labels, aims, boxes=boxes_of(x))
    assert result.perturbation.isfinite().all()


def boxes_of(x):
    return torch.tensor([[[10.0, 10, 60, 70], [50, 20, 120, 90]]]).expand(len(x), 2, 4)


def test_what_is_refused(network, detector):
    for make, message in (
        (lambda: defences.jpeg(network, 0), "quality must be at least 1, got 0"),
        (lambda: defences.bit_depth(network, 9), "bits must be at most 8, got 9"),
        (lambda: defences.median(network, 4), "size must be odd, got 4"),
        (lambda: defences.gaussian(network, 0), "sigma must be a finite number above 0, got 0"),
        (lambda: defences.noise(network, -1), "std must be a finite number above 0, got -1"),
        (lambda: defences.resize_pad(network, 1.5), r"least must be at most 1, got 1\.5"),
        (
            lambda: defences.augmented(network, ()),
            "scales must have at least one member",
        ),
        (lambda: defences.augmented(network, (1, 2)), r"scales\[1\] must be at most 1, got 2"),
        (lambda: defences.noise(network, seed=-1), "seed must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="model must be callable, got int"):
        defences.jpeg(3)
    with pytest.raises(TypeError, match="model must be a Detector, not a bare detector"):
        defences.jpeg(detector.network)
    flat = defences.resize_pad(lambda x: network(x).flatten(2))
    with pytest.raises(ValueError, match=r"model must return score maps \(N, C, h, w\)"):
        flat(images())
    one_stage = victims.detector(zoo.build("FCOS-VGG", num_classes=5, width=1 / 16).eval())
    assert defences.jpeg(one_stage).has_own_targets
    with pytest.raises(TypeError, match="which has its own targets"):
        defences.resize_pad(one_stage)


def test_batches_to_train_on(network):
    """The first images are attacked in eval mode; neither weights nor statistics change."""
    network = nn.Sequential(nn.BatchNorm2d(3), network).train()
    x = images(5)
    labels = torch.randint(5, (5, *SIZE), generator=generator(4))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    attack = PGD(epsilon=0.02, alpha=0.01, steps=3)
    mixed = training.attacked(attack, network, x, labels, share=0.6, generator=generator(5))
    change = (mixed - x).abs().amax((1, 2, 3))
    assert (change[:3] > 0.005).all()
    assert change[:3].max() <= 0.02 + 1e-6
    assert torch.equal(mixed[3:], x[3:])
    assert not mixed.requires_grad
    assert network.training
    assert network[0].training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    again = training.attacked(attack, network, x, labels, share=0.6, generator=generator(5))
    assert torch.equal(again, mixed)
    alone = attack(network, x[:3], labels[:3], generator=generator(5)).last
    assert torch.equal(alone, mixed[:3])
    assert torch.equal(training.attacked(attack, network, x, labels, share=0), x)
    everything = training.attacked(attack, network, x, labels, share=1, generator=generator(5))
    assert ((everything - x).abs().amax((1, 2, 3)) > 0.005).all()
    for given, message in (
        ({"share": 1.2}, r"share must be at most 1, got 1\.2"),
        ({"labels": labels[:2]}, r"images must have shape \(N, 3, H, W\) and one entry of labels"),
        ({"attack": "pgd"}, "attack must be an Attack, got str"),
    ):
        arguments = {"attack": attack, "model": network, "images": x, "labels": labels, **given}
        with pytest.raises((TypeError, ValueError), match=message):
            training.attacked(**arguments)


def test_the_last_iterate_is_not_evaluated(network):
    """As many passes as updates; where the attack itself ends, images that stopped early too."""
    x, labels = images(4), torch.randint(5, (4, *SIZE), generator=generator(4))
    labels[2] = 255
    labels[3] = network(x[3:]).argmin(1)[0]
    passes = []
    network.register_forward_hook(lambda *_: passes.append(1))
    for attack in (PGD(epsilon=0.02, alpha=0.01, steps=3), DAG(gamma=0.01, max_iter=3)):
        passes.clear()
        last = attack.last_iterate(network, x, labels, generator=generator(5))
        assert len(passes) == 3
        result = attack(network, x, labels, generator=generator(5))
        assert torch.equal(last, result.last)
        assert result.iterations.tolist() == [3, 3, 0, 0]
        assert attack.last_iterate(network, x[:0], labels[:0]).shape == (0, 3, *SIZE)
        wrong = labels.clone()
        wrong[1, 3, 4] = 7
        with pytest.raises(ValueError, match=r"labels must lie in .*, got 7"):
            attack.last_iterate(network, x, wrong)
    passes.clear()
    alma = dagcore.ALMAProx(steps=4)
    mixed = training.attacked(alma, network, x, labels, share=0.5, generator=generator(5))
    expected = alma(network, x[:2], labels[:2], generator=generator(5)).adversarial
    assert torch.equal(mixed[:2], expected)


def test_prepared_copies_follow_the_network():
    """Wherever they are: what is attacked is the network as it is now."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1))
    copy = victims.prepare(network.train(), example=images(1))
    assert copy.preparation.folded == 1
    x, labels = images(4), torch.randint(5, (4, SIZE[0] - 2, SIZE[1] - 2), generator=generator(4))
    attack = PGD(epsilon=0.02, alpha=0.01, steps=3)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    for around in (lambda one: one, nn.Sequential, defences.bit_depth):
        F.cross_entropy(network(x), labels).backward()
        optimizer.step()
        mixed = training.attacked(attack, around(copy), x, labels, share=1, generator=generator(5))
        anew = around(victims.prepare(network, example=images(1)))
        expected = attack(anew, x, labels, generator=generator(5)).last
        assert torch.equal(mixed, expected)


def test_inner_attacks():
    found = {name: training.inner(name, 8 / 255, 4) for name in training.INNER}
    assert [type(one).__name__ for one in found.values()] == ["PGD", "SegPGD", "DAG"]
    for one in found.values():
        assert one.epsilon == 8 / 255
    assert found["pgd"].alpha == found["dag"].gamma == pytest.approx(5 / 255)
    assert found["segpgd"].steps == found["dag"].max_iter == 4
    for arguments, message in (
        (("fgsm", 0.1, 1), "adversarial must be 'pgd', 'segpgd' or 'dag', got 'fgsm'"),
        (("pgd", 0, 1), "epsilon must be a finite number above 0, got 0"),
        (("pgd", 0.1, 0), "steps must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            training.inner(*arguments)


def test_training_makes_robust():
    """Of a strong feature, wrong at times, and a weak one that never is, it takes the first."""
    labels = torch.randint(2, (4, *SIZE), generator=generator(6))
    strong = torch.where(torch.rand(labels.shape, generator=generator(7)) < 0.1, 1 - labels, labels)
    x = torch.stack([0.44 + 0.12 * strong, 0.465 + 0.07 * labels, torch.full(labels.shape, 0.5)], 1)
    attack = PGD(epsilon=0.04, alpha=0.02, steps=4)
    right = {}
    for share in (0, 1):
        torch.manual_seed(1)
        network = victims.Victim(nn.Conv2d(3, 2, 1), mean=[0.5] * 3, std=[0.05] * 3)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
        for step in range(200):
            mixed = training.attacked(
                attack, network, x, labels, share=share, generator=generator(step)
            )
            loss = dagcore.losses.cross_entropy(network(mixed), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        result = attack(network, x, labels, generator=generator(9))
        clean = int((network(x).argmax(1) == labels).sum())
        right[share] = (clean / labels.numel(), int(result.left.sum()) / labels.numel())
    assert right[0][0] > 0.99
    assert right[0][1] < 0.5
    assert right[1][0] == pytest.approx(0.9, abs=0.02)
    assert right[1][1] > 0.85


def test_the_example_trains(capsys):
    path = Path(__file__).parents[1] / "examples" / "robust_training.py"
    module = runpy.run_path(str(path))
    assert not module["train"](2, batch=2).training
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 1", "step 2"]
