"""TOG's four goals: the targets by hand, and what they do to detectors of each kind."""

import pytest
import torch
from support import generator, same_bits

from dagcore import PGD, victims, zoo
from dagcore.data import Scenes
from dagcore.evaluation.tog import GOALS, goal_targets
from dagcore.metrics import AveragePrecision, DetectionErrors
from dagcore.victims.detection.targets import PADDED_TO

pytest.importorskip("torchvision.models.detection")

ATTACK = PGD(epsilon=8 / 255, alpha=2 / 255, steps=10, tolerance=None)
IGNORED = 255

# Classes: the background, a, b, one that is unused, c. Each row is a candidate.
CLASSES = ("background", "a", "b", "N/A", "c")
PROBABILITIES = torch.tensor(
    [
        [0.10, 0.60, 0.20, 0.05, 0.05],  # at object 0
        [0.10, 0.20, 0.10, 0.10, 0.50],  # at object 0
        [0.20, 0.10, 0.50, 0.15, 0.05],  # at object 1
        [0.70, 0.05, 0.05, 0.05, 0.15],  # at the crowd
        [0.50, 0.05, 0.15, 0.25, 0.05],  # at nothing
        [0.60, 0.05, 0.30, 0.03, 0.02],  # at object 0, whose class is improbable
    ]
)
BOXES = torch.tensor(
    [
        [10.0, 10, 30, 30],
        [15, 10, 35, 30],
        [40, 40, 60, 60],
        [0, 40, 20, 60],
        [40, 0, 60, 20],
        [10, 10, 30, 28],
    ]
)
TRUTH = {
    "boxes": torch.tensor([[10.0, 10, 30, 30], [40, 40, 60, 60], [0, 40, 20, 60]]),
    "labels": torch.tensor([1, 2, 4]),
    "iscrowd": torch.tensor([False, False, True]),
}
NOTHING = {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64)}
IMAGE = torch.full((3, 64, 64), 0.5)


class Fixed(victims.Detector):
    """The candidates above, in whatever image."""

    def __init__(self, own=False, classes=CLASSES):
        super().__init__(torch.nn.Identity(), classes)
        self.has_own_targets, self.runs = own, 0

    def forward(self, images, boxes=None):
        raise NotImplementedError

    def detect(self, images):
        raise NotImplementedError

    def candidates(self, images, nms_threshold, max_proposals):
        self.runs += 1
        images.zero_()  # its own to write into
        return [(BOXES, PROBABILITIES[:, : len(self.classes)].log())]


@pytest.mark.parametrize("own", [False, True])
def test_targets_by_hand(own):
    detector, image = Fixed(own), IMAGE.clone()
    targets = goal_targets(detector, image, TRUTH)
    assert detector.runs == 1
    assert torch.equal(image, IMAGE)
    assert tuple(targets) == GOALS
    most = goal_targets(detector, image, TRUTH, goals=["mislabel"], mislabel="most-likely")
    near, off = [1, 1, 2], [IGNORED] * 3
    # Object 0: b has 0.30 in all and c 0.55, the unused class less. Object 1: a 0.10, c 0.05.
    expected = {
        "vanish": ([1, 4, 2, 4, 2, 2], [0] * 6),
        "mislabel": (near + off, [2, 2, 4, *off]),
        "fabricate": ([*off, 0, 0, 0], [*off, 4, 2, 2]),
        "untargeted": (near + off, "untargeted"),
        "most": (near + off, [4, 4, 1, *off]),
    }
    for goal, got in {**targets, "most": most["mislabel"]}.items():
        labels, adversarial = expected[goal]
        if own:
            assert got.boxes is None
            assert got.labels.tolist() == labels
        else:
            kept = [k for k in range(6) if labels[k] != IGNORED]
            labels = [labels[k] for k in kept]
            count, padding = len(kept), [IGNORED] * (PADDED_TO - len(kept))
            assert torch.equal(got.boxes[:count], BOXES[kept])
            assert bool(got.boxes[count:].isnan().all())
            assert got.labels.tolist() == labels + padding
            if adversarial != "untargeted":
                adversarial = [adversarial[k] for k in kept] + padding
        assert (
            got.adversarial == adversarial
            if adversarial == "untargeted"
            else got.adversarial.tolist() == adversarial
        )


def test_without_objects_nothing_is_near_any():
    targets = goal_targets(Fixed(own=True), IMAGE, NOTHING, ignore_index=-1)
    for goal in ("mislabel", "untargeted"):
        assert targets[goal].labels.tolist() == [-1] * 6
    assert targets["mislabel"].adversarial.tolist() == [-1] * 6
    assert targets["vanish"].labels.tolist() == [1, 4, 2, 4, 2, 2]
    assert targets["fabricate"].labels.tolist() == [-1, -1, -1, 0, 0, 0]
    boxes = goal_targets(Fixed(), IMAGE, NOTHING, goals=["untargeted"])["untargeted"].boxes
    assert boxes.shape == (0, 4)


def test_near_is_what_dense_targets_says():
    detector, (scene,) = (
        victims.detector(zoo.load("FR-ZF-07")),
        Scenes("07", "test", count=1, first=1),
    )
    truth = {"boxes": scene.boxes, "labels": scene.labels}
    dense = detector.dense_targets(scene.image[None], [truth])
    with detector.encoded(scene.image[None]):
        targets = goal_targets(detector, scene.image, truth, goals=["untargeted"])["untargeted"]
    assert int(dense.counts[0]) > 20
    assert torch.equal(targets.labels, dense.labels[0])
    assert torch.equal(targets.boxes.nan_to_num(-1), dense.boxes[0].nan_to_num(-1))


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"detector": torch.nn.Identity()}, TypeError, "detector must be a dagcore.victims.Det"),
        ({"image": IMAGE[None]}, ValueError, r"image must have shape \(3, H, W\), got \(1, 3, "),
        ({"image": IMAGE.byte()}, TypeError, "image must be "),
        ({"goals": ["hide"]}, ValueError, "goals must be 'vanish', 'mislabel', 'fabricate' or "),
        ({"mislabel": "random"}, ValueError, "mislabel must be 'least-likely' or 'most-likely'"),
        ({"max_proposals": 0}, ValueError, "max_proposals must be at least 1, got 0"),
        ({"ignore_index": 4}, ValueError, "ignore_index must not be one of the 5 classes, got 4"),
        ({"truth": {"boxes": BOXES}}, ValueError, "must have 'boxes' and 'labels'"),
        (
            {"detector": Fixed(classes=CLASSES[:2]), "truth": NOTHING},
            ValueError,
            "goals must not have 'mislabel' for a detector with one object class",
        ),
    ],
)
def test_bad_arguments(change, error, told):
    given = {"detector": Fixed(), "image": IMAGE, "truth": TRUTH, **change}
    with pytest.raises(error, match=told):
        goal_targets(given.pop("detector"), given.pop("image"), given.pop("truth"), **given)


def attacked(detector, image, targets, seed=0):
    """The last iterate, as TOG returns it."""
    adversarial, boxes = targets.adversarial, targets.boxes
    return ATTACK(
        detector,
        image[None],
        targets.labels[None],
        adversarial if isinstance(adversarial, str) else adversarial[None],
        generator=generator(seed),
        boxes=None if boxes is None else boxes[None],
    ).last


@pytest.mark.parametrize("name", ["FR-ZF-07", "FCOS-VGG"])
def test_each_goal_does_what_it_says(name):
    detector, scenes = victims.detector(zoo.load(name)), list(Scenes("07", "test", count=6))
    measures = {goal: (AveragePrecision(13), DetectionErrors(13)) for goal in ("clean", *GOALS)}
    for n, scene in enumerate(scenes):
        targets = goal_targets(
            detector, scene.image, {"boxes": scene.boxes, "labels": scene.labels}
        )
        images = {goal: attacked(detector, scene.image, targets[goal], n) for goal in GOALS}
        for goal, image in {"clean": scene.image[None], **images}.items():
            assert float((image - scene.image).abs().max()) <= 8 / 255 + 1e-6
            with torch.no_grad():
                (found,) = detector.detect(image)
            for measure in measures[goal]:
                measure.update(found, scene.boxes, scene.labels, scene.difficult)
    precision = {goal: measure.compute().mean for goal, (measure, _) in measures.items()}
    errors = {goal: measure.compute() for goal, (_, measure) in measures.items()}
    clean = errors["clean"]
    if name != "FCOS-VGG":  # whose scores are multiplied by a centre-ness that is not attacked
        assert errors["vanish"].detections < 0.6 * clean.detections
    assert errors["vanish"].correct < 0.5 * clean.correct
    assert errors["mislabel"].correct < 0.2 * clean.correct
    assert errors["mislabel"].classification > 2 * clean.classification
    assert errors["fabricate"].detections > clean.detections
    invented = {goal: counts.both + counts.background for goal, counts in errors.items()}
    assert invented["fabricate"] > 3 * invented["clean"] + 3
    assert errors["untargeted"].correct < 0.2 * clean.correct
    for goal in ("vanish", "mislabel", "untargeted"):
        assert precision[goal] < 0.6 * precision["clean"]


def test_a_detector_is_left_as_it_was():
    """Weights, buffers (of batch norms, in training mode), hooks, modes, gradients."""
    network = zoo.load("R-FCN-RN50").train()
    network.backbone.eval()
    first, *_ = network.parameters()
    first.requires_grad_(False)
    calls = []
    network.backbone.register_forward_hook(lambda *_: calls.append(1))

    def state():
        modules = dict(network.named_modules())
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return (
            {name: module.training for name, module in modules.items()},
            {name: [list(getattr(m, hook)) for hook in hooks] for name, m in modules.items()},
            {name: (p.requires_grad, p.grad) for name, p in network.named_parameters()},
        )

    before = state()
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    assert any("running_mean" in key for key in weights)
    detector, (scene,) = victims.detector(network), Scenes("07", "test", count=1)
    mode = detector.training
    targets = goal_targets(detector, scene.image, {"boxes": scene.boxes, "labels": scene.labels})
    assert calls == [1]  # one pass for all goals
    for goal in GOALS:
        attacked(detector, scene.image, targets[goal])
    assert detector.network is network
    assert detector.training == mode
    assert state() == before
    after = network.state_dict()
    assert after.keys() == weights.keys()
    for key, value in weights.items():
        real = value.is_floating_point()
        assert same_bits(after[key], value) if real else torch.equal(after[key], value)
