"""Bad input that used to end deep inside names the argument, what was required and what came."""

from __future__ import annotations

import copy
import functools
import json

import numpy as np
import pytest
import torch
from torch import nn

import dagcore
from dagcore import (
    DAG,
    PGD,
    ALMAProx,
    Part,
    Sample,
    joint_attack,
    losses,
    metrics,
    perturbation,
    victims,
)
from dagcore.data import Scenes
from dagcore.data.coco import CocoBoxes
from dagcore.defences import augmented
from dagcore.defences.training import attacked

IMAGES = torch.full((1, 3, 4, 4), 0.5)
LABELS = torch.zeros(1, 4, 4, dtype=torch.int64)
SCORES = torch.zeros(1, 2, 4, 4)
NETWORK = nn.Conv2d(3, 2, 1)
nn.init.constant_(NETWORK.bias, 5)  # scores that are no probabilities
BOX = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
ONE = torch.tensor([1])
SEEN = {"boxes": BOX, "labels": ONE, "scores": torch.tensor([0.5])}


def average_precision(prediction, boxes=BOX, labels=ONE):
    metrics.AveragePrecision(2).update(prediction, boxes, labels)


def own(loss):
    PGD(epsilon=0.1, alpha=0.1, steps=1, loss=loss)(NETWORK, IMAGES, LABELS)


CASES = {
    "the output of a torchvision network as scores": (
        lambda: losses.cross_entropy({"out": SCORES}, LABELS),
        "scores must be a torch.Tensor, got dict",
    ),
    "labels of NumPy": (
        lambda: losses.cross_entropy(SCORES, LABELS.numpy()),
        "labels must be a torch.Tensor, got ndarray",
    ),
    "a mean over all targets as a loss": (
        lambda: own(lambda s, y: nn.functional.cross_entropy(s, y)),
        r"got \(\) \(torch.nn losses need reduction='none'\)",
    ),
    "a loss without a gradient": (
        lambda: own(lambda s, y: (s.argmax(1) == y).float()),
        "loss must be differentiable in the scores",
    ),
    "a loss of something else": (
        lambda: own(lambda s, y: torch.zeros(1, requires_grad=True) * 2),
        "loss must be differentiable in the scores",
    ),
    "no attack for several networks": (
        lambda: joint_attack("dag", [Part(NETWORK, LABELS)], IMAGES),
        r"attack must be an Attack, such as DAG\(\), got 'dag'",
    ),
    "no attack for several images": (
        lambda: dagcore.universal_perturbation(DAG, NETWORK, [Sample(IMAGES[0], LABELS[0])]),
        r"attack must be an Attack, such as DAG\(\), got <class",
    ),
    "adversarial labels of NumPy": (
        lambda: DAG()(NETWORK, IMAGES, LABELS, LABELS.numpy()),
        "adversarial_labels must be a torch.Tensor, a string or None, got ndarray",
    ),
    "boxes for a network": (
        lambda: DAG()(NETWORK, IMAGES, LABELS, boxes=BOX[None]),
        "model must accept images and boxes, got Conv2d, which does not",
    ),
    "boxes for a function": (
        lambda: DAG()(lambda x: NETWORK(x), IMAGES, LABELS, boxes=BOX[None]),
        "model must accept images and boxes, got function, which does not",
    ),
    "no boxes for a model that needs them": (
        lambda: DAG()(lambda x, boxes: NETWORK(x), IMAGES, LABELS),
        "model must accept images alone, as no boxes are given, got function, which does not",
    ),
    "images in 0..255": (
        lambda: DAG()(NETWORK, 255 * IMAGES, LABELS),
        r"divide by 255, or set bounds=\(0, 255\)",
    ),
    "bounds that are empty": (
        lambda: DAG(bounds=(1, 0))(NETWORK, IMAGES, LABELS),
        r"bounds must be \(lower, upper\) with lower below upper",
    ),
    "a function to stop early": (
        lambda: victims.low_resolution(lambda x: x),
        "model must be a segmentation network of torchvision, .* got builtins.function",
    ),
    "a network as a name": (
        lambda: victims.load(NETWORK),
        "spec must be a name, got Conv2d",
    ),
    "one number for three channels": (
        lambda: victims.Victim(NETWORK, mean=0.5),
        "mean must be three numbers, one per channel, got 0.5",
    ),
    "no mean": (
        lambda: victims.Victim(NETWORK, mean=None),
        "mean must be three numbers, one per channel, got None",
    ),
    "a mean beyond floating point": (
        lambda: victims.Victim(NETWORK, mean=[10**400, 0, 0]),
        "mean must be three numbers, one per channel",
    ),
    "a deviation of 0": (
        lambda: victims.Victim(NETWORK, std=(1, 0, 1)),
        r"std must be three numbers above 0, one per channel, got \(1, 0, 1\)",
    ),
    "a network that cannot be called": (
        lambda: victims.Victim("fcn"),
        "network must be callable, got str",
    ),
    "detections in a list": (
        lambda: average_precision([SEEN]),
        "prediction must be a mapping .* got list",
    ),
    "no true labels": (
        lambda: average_precision(SEEN, labels=None),
        "labels must be a torch.Tensor, got NoneType",
    ),
    "more predictions than masks": (
        lambda: metrics.mean_iou([LABELS[0]] * 2, [LABELS[0]], 2),
        "predictions and masks must have the same length, got 1 masks and more of the others",
    ),
    "a slice of scenes": (
        lambda: Scenes("07", "test", count=3)[0:2],
        r"index must be an integer, got slice\(0, 2, None\)",
    ),
    "images in a list": (
        lambda: perturbation.value_range([0.5]),
        "images must be a torch.Tensor, got list",
    ),
    "one scale": (
        lambda: augmented(NETWORK, 0.8),
        "scales must be a sequence of numbers, got 0.8",
    ),
    "training without labels": (
        lambda: attacked(DAG(), NETWORK, IMAGES, None),
        "labels must be a torch.Tensor, got NoneType",
    ),
}


@pytest.mark.parametrize(("call", "message"), CASES.values(), ids=CASES)
def test_the_error_names_the_argument(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_an_annotation_without_categories_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"images": [], "annotations": []}))
    with pytest.raises(ValueError, match="cannot be read as COCO's: 'categories' is missing"):
        CocoBoxes(path)


@pytest.mark.parametrize(
    "mean",
    [
        [1, 2, 3],
        (1.0, 2.0, 3.0),
        np.array([3, 2, 1])[::-1],
        torch.tensor([1, 2, 3]),
        torch.tensor([1, 2, 3], dtype=torch.float64),
        nn.Parameter(torch.tensor([[[1.0]], [[2.0]], [[3.0]]])),
    ],
)
def test_a_mean_may_be_any_three_numbers(mean):
    victim = copy.deepcopy(victims.Victim(NETWORK, mean=mean, std=mean))
    for kept in (victim.mean, victim.std):
        assert kept.flatten().tolist() == [1, 2, 3]
        assert kept.shape == (3, 1, 1)
        wide = getattr(mean, "dtype", None) is torch.float64
        assert kept.dtype == (torch.float64 if wide else torch.float32)


class Merging(nn.Module):
    """Takes boxes by a hook, which `forward` does not show."""

    def __init__(self):
        super().__init__()
        self.network = NETWORK
        self.register_forward_pre_hook(lambda _, given: given[:1])

    def forward(self, images):
        return self.network(images).flatten(2)[..., :1]


@functools.wraps(NETWORK.forward)
def wrapped(*given):
    return NETWORK(given[0]).flatten(2)[..., :1]


@pytest.mark.parametrize(
    "model",
    [
        Merging(),
        wrapped,
        functools.partial(lambda n, x, b: n(x).flatten(2)[..., :1], NETWORK),
        lambda images, boxes=None: NETWORK(images).flatten(2)[..., :1],
    ],
)
def test_whatever_takes_boxes_is_attacked_with_them(model):
    result = DAG(max_iter=1)(model, IMAGES, torch.zeros(1, 1, dtype=torch.int64), boxes=BOX[None])
    assert result.targets.tolist() == [1]


def test_a_loss_of_no_images():
    attack = PGD(loss=lambda scores, labels: scores.sum(1))
    assert attack.count_active(NETWORK, IMAGES[:0], LABELS[:0], "untargeted").shape == (0,)


@pytest.mark.parametrize("labels", ["untargeted", "random"])
def test_a_loss_of_other_arguments(labels):
    wanted = r", adversarial_labels\) in a targeted attack" if labels == "random" else r"\)"
    message = rf"loss must take \(scores, labels{wanted}, got a function of \(scores\)"
    with pytest.raises(TypeError, match=message):
        PGD(loss=lambda scores: scores.sum(1))(NETWORK, IMAGES, LABELS, labels)


def test_no_images_for_a_loss_of_several_classes():
    assert ALMAProx(steps=2)(NETWORK, IMAGES[:0], LABELS[:0]).status == ()
    assert PGD(loss="dlr")(NETWORK, IMAGES[:0], LABELS[:0], "random").status == ()
