"""Any detector through `dense_detector`: its targets, detections, attacks and errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command_line import attack, record
from PIL import Image
from support import generator
from torch import nn

from dagcore import DAG, Status, victims
from dagcore.__main__ import main

ops = pytest.importorskip("torchvision.ops")

REAL = Path(__file__).parents[2] / "shared" / "real"
CELL = 8
CLASSES = 3


class Head(nn.Module):
    """A small detector as YOLO is: one box a cell, an objectness, and sigmoids of the classes."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, CELL, CELL), nn.BatchNorm2d(8), nn.SiLU())
        self.boxes, self.object = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 1, 1)
        self.classes = nn.Conv2d(8, CLASSES, 1)

    def raw(self, images):
        features = self.features(images)
        height, width = features.shape[2:]
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        centre = torch.stack([x, y, x, y]) * CELL + CELL / 2
        sides = (
            self.boxes(features).sigmoid() * 2 * CELL * torch.tensor([-1, -1, 1, 1])[:, None, None]
        )
        boxes = (centre + sides).flatten(2).transpose(1, 2)
        return boxes, self.object(features).flatten(2), self.classes(features).flatten(2)

    def forward(self, images):
        boxes, objectness, classes = self.raw(images)
        log_p = F.logsigmoid(objectness) + F.logsigmoid(classes)
        return boxes, log_p - torch.log(-torch.expm1(log_p))


def made():
    torch.manual_seed(1)
    network = Head().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)
    return network


def some_images(count=2):
    return torch.rand(count, 3, 40, 56, generator=generator(2))


def test_the_best_class_is_an_object_where_one_is_reported():
    network, images = made(), some_images()
    victim = victims.dense_detector(network, threshold=0.4, iou_threshold=1.0)
    with torch.no_grad():
        scores = victim(images)
        boxes, objectness, classes = network.raw(images)
        found = victim.detect(images)
    probability = objectness.sigmoid() * classes.sigmoid()
    torch.testing.assert_close(victim.probabilities(scores)[:, :CLASSES], probability)
    assert scores.shape == (2, CLASSES + 1, 35)
    reported = probability.amax(1) > 0.4
    assert 5 < int(reported.sum()) < 65
    assert torch.equal(scores.argmax(1) != victim.background, reported)
    clipped = ops.clip_boxes_to_image(boxes, (40, 56))
    for n in range(2):
        order = probability[n].amax(0)[reported[n]].argsort(descending=True)
        assert torch.equal(found[n]["boxes"], clipped[n][reported[n]][order])
        assert torch.equal(found[n]["labels"], probability[n].argmax(0)[reported[n]][order])
        assert float(found[n]["scores"].min()) > 0.4


def test_detections_of_a_class_are_thinned_out():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]])
    logits = torch.tensor([[[2.0, 1, -9, 0.5], [-9, -9, 3, -9]]])
    victim = victims.dense_detector(lambda x: (boxes[None], logits), threshold=0.5)
    (found,) = victim.detect(torch.zeros(1, 3, 32, 32))
    assert found["labels"].tolist() == [1, 0, 0]
    assert torch.equal(found["boxes"], boxes[[2, 0, 3]])
    torch.testing.assert_close(found["scores"], torch.tensor([3, 2, 0.5]).sigmoid())
    few = victims.dense_detector(victim.network, threshold=0.5, max_detections=2)
    assert few.detect(torch.zeros(1, 3, 32, 32))[0]["labels"].tolist() == [1, 0]


def test_a_softmax_with_a_background():
    boxes = torch.tensor([[[0.0, 0, 9, 9], [9, 9, 20, 20], [20, 20, 30, 30]]])
    logits = torch.tensor([[[4.0, 0, 0], [0, 2, 0.1], [0, 0, 0]]])
    images = torch.zeros(1, 3, 32, 32)
    victim = victims.dense_detector(
        lambda x: (boxes, logits), background=0, classes=("none", "cat", "dog")
    )
    assert torch.equal(victim(images), logits)
    assert victim.object_classes() == {"cat": 1, "dog": 2}
    (found,) = victim.detect(images)
    assert found["labels"].tolist() == [1, 1]
    torch.testing.assert_close(found["scores"], logits[0, :, 1:].softmax(0)[1])
    sure = victims.dense_detector(victim.network, background=0, threshold=0.5)
    assert len(sure.detect(images)[0]["labels"]) == 1
    truth = [{"boxes": boxes[0, 1:2], "labels": torch.tensor([1])}]
    targets = victim.dense_targets(images, truth, adversarial="vanish")
    assert targets.labels.tolist() == [[255, 1, 255]]
    assert targets.adversarial_labels.tolist() == [[255, 0, 255]]


@pytest.mark.parametrize("adversarial", ["permutation", "vanish"])
def test_attacked_in_a_batch_and_in_a_stream(adversarial):
    victim, images = victims.dense_detector(made(), threshold=0.4), some_images()
    assert victim.background == 0  # nothing has told the classes yet
    targets = victim.dense_targets(
        images, confidence=0.4, adversarial=adversarial, generator=generator(0)
    )
    assert victim.background == CLASSES
    assert int(targets.counts.min()) > 2
    assert bool((targets.adversarial_labels == CLASSES).any()) == (adversarial == "vanish")
    dag = DAG(gamma=2 / 255)
    result = dag(victim, images, targets.labels, targets.adversarial_labels)
    assert set(result.status) == {Status.CONVERGED}
    assert int(result.iterations.min()) > 0
    again = DAG(gamma=2 / 255, backend="reference")(
        victim, images, targets.labels, targets.adversarial_labels, boxes=targets.boxes
    )
    assert torch.equal(again.iterations, result.iterations)
    for one in dag.stream(victim, targets.samples(images), slots=2):
        torch.testing.assert_close(one.adversarial[0], result.adversarial[one.key])
    with torch.no_grad():
        left = victim(result.adversarial).argmax(1) == targets.labels
    assert not bool(left.any())


def test_prepared_and_encoded():
    network, images = made(), some_images()
    victim = victims.dense_detector(network, threshold=0.4)
    faster = victims.prepare(victim)
    assert faster.preparation.folded == 1
    torch.testing.assert_close(faster(images), victim(images), rtol=1e-4, atol=1e-4)
    runs = []
    network.register_forward_hook(lambda *_: runs.append(1))
    x = images.clone().requires_grad_()
    outside = victim(images)
    with victim.encoded(x):
        inside, found = victim(x), victim.detect(x)
        assert len(runs) == 2
    assert torch.equal(inside, outside)
    assert torch.equal(found[0]["boxes"], victim.detect(images)[0]["boxes"])
    assert float(torch.autograd.grad(inside[:, 0].sum(), x)[0].abs().max()) > 0


def test_images_of_another_size_are_resized():
    network, images = made(), some_images()
    victim = victims.dense_detector(network, threshold=0.4, size=(80, 112))
    larger = F.interpolate(images, (80, 112), mode="bilinear", antialias=True)
    with torch.no_grad():
        boxes, logits = network(larger)
        (candidate, scores), _ = victim.candidates(images, 0.9, 9)
    assert torch.equal(scores.T[:CLASSES], logits[0])
    torch.testing.assert_close(candidate, ops.clip_boxes_to_image(boxes[0] / 2, (40, 56)))


def test_a_method_of_a_module_is_held_in_eval_mode():
    network = made().train()
    victim = victims.dense_detector(network.forward, threshold=0.4)
    targets = victim.dense_targets(some_images(), confidence=0.4)
    modes = []
    network.features.register_forward_hook(lambda module, *_: modes.append(module.training))
    DAG(max_iter=1)(victim, some_images(), targets.labels, targets.adversarial_labels)
    assert set(modes) == {False}
    assert network.training


BOXES, LOGITS = torch.zeros(1, 5, 4), torch.zeros(1, 2, 5)


@pytest.mark.parametrize(
    ("output", "options", "error", "message"),
    [
        ([LOGITS] * 3, {}, TypeError, r"function must return two tensors.*got list of 3: \(1, 2"),
        ({"boxes": BOXES}, {}, TypeError, r"got dict of 1: 'boxes': \(1, 5, 4\)"),
        ((LOGITS, BOXES), {}, ValueError, r"boxes of shape \(1, A, 4\).*got \(1, 2, 5\)"),
        ((BOXES, LOGITS.transpose(1, 2)), {}, ValueError, r"transpose\(1, 2\)"),
        ((BOXES, LOGITS[..., :4]), {}, ValueError, r"logits of shape \(1, C, 5\).*got \(1, 2, 4\)"),
        (
            (BOXES, LOGITS),
            {"classes": ["a"]},
            ValueError,
            "must have a name for each of the 2 classes",
        ),
        ((BOXES, LOGITS), {"background": 2}, ValueError, "background must be one of the 2 classes"),
    ],
)
def test_what_a_function_returns_is_checked(output, options, error, message):
    victim = victims.dense_detector(lambda x: output, threshold=0.5, **options)
    with pytest.raises(error, match=message):
        victim.detect(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "threshold must be given for sigmoids"),
        ({"threshold": 0.0}, "threshold must be a finite number above 0"),
        ({"threshold": 1.0}, r"threshold must lie in \(0, 1\), got 1.0"),
        ({"threshold": 0.5, "background": -1}, "background must be at least 0"),
        ({"threshold": 0.5, "iou_threshold": 2.0}, "iou_threshold must lie in"),
        ({"threshold": 0.5, "max_detections": 0}, "max_detections must be at least 1"),
        ({"threshold": 0.5, "size": (0, 8)}, "size must be at least 1"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        victims.dense_detector(made(), **options)


def test_the_ways_into_detector():
    victim = victims.dense_detector(made(), threshold=0.4)
    assert victims.detector(victim) is victim
    with pytest.raises(ValueError, match="classes must not be given for a Detector"):
        victims.detector(victim, classes=["a"])
    with pytest.raises(TypeError, match="use dense_detector for others"):
        victims.detector(made())


PLACES = """
import torch
from dagcore import victims

def make():
    weight = torch.tensor([[4.0, -2, -2], [-2, 4, -2]])[:, :, None, None] / 64
    weight = weight.repeat(1, 1, 8, 8)
    y, x = torch.meshgrid(8 * torch.arange(3), 8 * torch.arange(4), indexing="ij")
    boxes = torch.stack([x, y, x + 8, y + 8], -1).reshape(12, 4).float()

    def function(images):
        logits = torch.nn.functional.conv2d(images, weight, stride=8).flatten(2)
        return boxes.expand(len(images), 12, 4), logits

    return victims.dense_detector(function, threshold=0.7, classes=["red", "green"])
"""


def test_a_run_judges_class_0_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "places_victim.py").write_text(PLACES)
    (tmp_path / "photos").mkdir()
    image = np.full((24, 32, 3), 30, np.uint8)
    image[:8, :8, 0] = image[16:, 8:16, 1] = 250
    Image.fromarray(image).save("photos/a.png")
    options = ["--data", "photos", "--model", "places_victim:make", "--out", "out"]
    assert main(["run", *options, "--adversarial", "vanish", "--gamma", "2/255"]) == 0
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["mAP"]
    assert found["before"] == {"mean": 100.0, "classes": {"red": 100.0, "green": 100.0}}
    assert found["after"]["mean"] == 0


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/real is not there")
def test_nanodet(tmp_path, monkeypatch):
    """A real detector: the same findings as its own, none of them after an attack."""
    monkeypatch.chdir(tmp_path)
    data = pytest.importorskip("skimage.data")
    photo = Image.fromarray(data.astronaut()).crop((80, 0, 400, 320)).resize((224, 224))
    photo.save("astronaut.png")
    (tmp_path / "nanodet_victim.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(REAL)!r})\n"
        "import networks\n"
        "from dagcore import victims\n"
        "def make():\n"
        f"    network = networks.load_nanodet({str(REAL / 'nanodet_coco.safetensors')!r})\n"
        "    return victims.dense_detector(network, threshold=0.35, classes=networks.COCO)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert (
        attack("--adversarial", "vanish", model="nanodet_victim:make", image="astronaut.png") == 0
    )
    numbers = record("astronaut")
    assert numbers["status"] == "converged"
    assert numbers["targets"] > 3
    victim = victims.load("nanodet_victim:make")
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        own, found = victim.network.detect(image)[0], victim.detect(image)[0]
    for key, values in own.items():
        assert torch.equal(values, found[key])
    assert numbers["detections"]["scores"] == pytest.approx(own["scores"].tolist(), abs=1e-4)
    assert victim.classes[int(own["labels"][0])] == "person"
