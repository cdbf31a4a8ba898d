"""Detectors as victims: their scores at fixed boxes, the targets of an attack, and attacks."""

import dataclasses
import threading

import pytest
import torch
from support import generator, same_bits
from torch import nn

import dagcore
from dagcore import DAG, Sample, victims, zoo
from dagcore.data import Scenes
from dagcore.victims.detection.targets import PADDED_TO, check_inside, match
from dagcore.victims.detection.two_stage import without_repeats

detection = pytest.importorskip("torchvision.models.detection")

CLASSES = 5
SIZE = (72, 96)


def small_zoo(name, **options):
    network = zoo.build(
        name, num_classes=CLASSES, width=1 / 16, min_size=64, max_size=128, **options
    )
    return network


def small_fpn(**options):
    return detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=CLASSES,
        min_size=64,
        max_size=128,
        **options,
    )


def small_fpn_v2():
    """A head of convolutions with batch norm, and levels that some boxes never read."""
    return detection.fasterrcnn_resnet50_fpn_v2(
        weights=None, weights_backbone=None, num_classes=CLASSES, min_size=64, max_size=128
    )


TWO_STAGE = {
    "FR-ZF": lambda: small_zoo("FR-ZF-07"),
    "FR-VGG": lambda: small_zoo("FR-VGG-07"),
    "R-FCN": lambda: small_zoo("R-FCN-RN50"),
    "FPN": small_fpn,
    "FPN v2": small_fpn_v2,
}


def small_one_stage(kind, **options):
    return kind(weights=None, weights_backbone=None, num_classes=CLASSES, **options)


ONE_STAGE = {
    "RetinaNet": lambda: small_one_stage(
        detection.retinanet_resnet50_fpn, min_size=64, max_size=128
    ),
    "FCOS": lambda: small_one_stage(detection.fcos_resnet50_fpn, min_size=64, max_size=128),
    "SSDlite": lambda: small_one_stage(detection.ssdlite320_mobilenet_v3_large),
}


def made(make):
    """A network with random weights, in eval mode, whose scores differ from box to box."""
    torch.manual_seed(3)
    network = make().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return network


def some_images(count=2, dtype=torch.float32):
    return torch.rand(count, 3, *SIZE, generator=generator(5), dtype=dtype)


def some_boxes(count=2, boxes=6, padding=2, dtype=torch.float32):
    rng = generator(7)
    height, width = SIZE
    corner = torch.rand(count, boxes, 2, generator=rng, dtype=dtype) * 0.6
    extent = 0.15 + torch.rand(count, boxes, 2, generator=rng, dtype=dtype) * 0.24
    scale = torch.tensor([width, height], dtype=dtype)
    found = torch.cat([corner * scale, (corner + extent) * scale], -1)
    found[1:, boxes - padding :] = torch.nan
    return found


def aim(victim, images, boxes=None):
    """Labels that most targets have at the start, and others to be led to."""
    with torch.no_grad():
        scores = victim(images, boxes)
    labels = scores.argmax(1)
    adversarial = (labels + 1) % scores.shape[1]
    if boxes is not None:
        labels = torch.where(boxes[..., 0].isnan(), 255, labels)
    return labels, adversarial


# --- two stages


@pytest.mark.parametrize("name", TWO_STAGE)
def test_scores_are_those_of_the_detectors_own_head(name):
    network = made(TWO_STAGE[name])
    images, boxes = some_images(), some_boxes()
    scores = victims.detector(network)(images, boxes)
    assert scores.shape == (2, CLASSES, 6)
    with torch.no_grad():
        transformed, _ = network.transform(list(images))
        features = network.backbone(transformed.tensors)
        features = {"0": features} if isinstance(features, torch.Tensor) else features
        height, width = transformed.image_sizes[0]
        assert (height, width) != SIZE  # so that boxes have to be resized as well
        factor = torch.tensor([width / SIZE[1], height / SIZE[0]]).repeat(2)
        for n in range(2):
            own = boxes[n][~boxes[n, :, 0].isnan()] * factor
            lists = [own if k == n else own[:0] for k in range(2)]
            heads = network.roi_heads
            pooled = heads.box_roi_pool(features, lists, transformed.image_sizes)
            expected, _ = heads.box_predictor(heads.box_head(pooled))
            torch.testing.assert_close(scores[n, :, : len(own)].T, expected, rtol=1e-4, atol=1e-5)
            assert float(expected.std(0).max()) > 1e-4  # boxes differ
    assert bool((scores[1, :, 4:] == 0).all())


@pytest.mark.parametrize("name", ["FR-VGG", "R-FCN", "FPN"])
def test_gradient_reaches_the_raw_image(name):
    network = made(TWO_STAGE[name]).double().requires_grad_(False)
    victim = victims.detector(network, active_only=False)
    images, boxes = some_images(dtype=torch.float64), some_boxes(dtype=torch.float64)
    rng = generator(1)
    seed = torch.randn(2, CLASSES, 6, generator=rng, dtype=torch.float64)
    seed *= torch.rand(2, 1, 6, generator=rng) < 0.5
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(victim(x, boxes), x, seed)
    checked = 0
    for k in range(5):
        direction = torch.randn(images.shape, generator=generator(10 + k), dtype=torch.float64)
        step = 1e-7
        with torch.no_grad():
            after, before = (victim(images + s * direction, boxes) for s in (step, -step))
        measured = float(((after - before) * seed).sum()) / (2 * step)
        expected = float((gradient * direction).sum())
        # A kink of a ReLU or a maximum now and then lies between the two points.
        checked += abs(measured - expected) <= 1e-4 * max(abs(expected), 1e-3)
    assert checked >= 4


@pytest.mark.parametrize(
    ("name", "rows"), [("FR-ZF", 1), ("FR-ZF", 1000), *((name, 4) for name in TWO_STAGE)]
)
def test_active_boxes_alone_give_the_same_gradient(name, rows):
    network = made(TWO_STAGE[name]).requires_grad_(False)
    images, boxes = some_images(), some_boxes()
    seed = torch.randn(2, CLASSES, 6, generator=generator(2))
    seed[:, :, ::2] = 0
    found = []
    for options in ({"active_only": True, "rows": rows}, {"active_only": False}):
        x = images.clone().requires_grad_()
        scores = victims.detector(network, **options)(x, boxes)
        (gradient,) = torch.autograd.grad(scores, x, seed)
        found.append((scores.detach(), gradient))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    assert float(found[0][1].abs().max()) > 0


def test_backward_runs_the_head_on_active_boxes_only():
    network = made(TWO_STAGE["FR-VGG"]).requires_grad_(False)
    seen = []
    network.roi_heads.box_head.register_forward_hook(lambda m, i, o: seen.append(len(o)))
    x, boxes = some_images().requires_grad_(), some_boxes()
    scores = victims.detector(network, active_only=True, distinct=False)(x, boxes)
    assert seen == [10]  # 12 less the padding
    seed = torch.zeros_like(scores)
    seed[0, 1, 3] = 1
    torch.autograd.grad(scores, x, seed)
    assert seen == [10, 1]
    seen.clear()
    scores = victims.detector(network, active_only=False, distinct=False)(x, boxes)
    torch.autograd.grad(scores, x, seed)
    assert seen == [10]


@pytest.mark.parametrize("name", TWO_STAGE)
def test_attack_equals_the_reference(name):
    victim = victims.detector(made(TWO_STAGE[name]))
    images, boxes = some_images(3), some_boxes(3)
    labels, adversarial = aim(victim, images, boxes)
    results = [
        DAG(max_iter=6, backend=backend)(victim, images, labels, adversarial, boxes=boxes)
        for backend in ("native", "reference")
    ]
    assert torch.equal(results[0].active, results[1].active)
    assert results[0].targets.tolist() == [6, 4, 4]
    assert int(results[0].iterations.max()) > 0
    torch.testing.assert_close(results[0].adversarial, results[1].adversarial, rtol=0, atol=1e-6)


def test_batch_and_stream_equal_each_image_alone():
    victim = victims.detector(made(TWO_STAGE["FR-ZF"]))
    images, boxes = some_images(4), some_boxes(4)
    labels, adversarial = aim(victim, images, boxes)
    labels[1] = torch.where(labels[1] == 255, 255, (labels[1] + 2) % CLASSES)  # wrong at once
    attack = DAG(max_iter=8)
    together = attack(victim, images, labels, adversarial, boxes=boxes)
    samples = [Sample(images[n], labels[n], adversarial[n], boxes[n], key=n) for n in range(4)]
    streamed = {r.key: r for r in attack.stream(victim, samples, slots=2)}
    for n in range(len(images)):
        one = slice(n, n + 1)
        alone = attack(victim, images[one], labels[one], adversarial[one], boxes=boxes[one])
        for other in (streamed[n], dataclasses.replace(together, active=together.active[:, one])):
            assert torch.equal(alone.active, other.active)
        torch.testing.assert_close(streamed[n].adversarial, alone.adversarial, rtol=0, atol=1e-5)
        torch.testing.assert_close(together.adversarial[one], alone.adversarial, rtol=0, atol=1e-5)
    assert len(set(together.iterations.tolist())) > 1  # slots closed up on the way


def test_count_active_at_boxes():
    victim = victims.detector(made(TWO_STAGE["FR-ZF"]))
    images, boxes = some_images(), some_boxes()
    labels, adversarial = aim(victim, images, boxes)
    attack = DAG(max_iter=3)
    result = attack(victim, images, labels, adversarial, boxes=boxes)
    count = attack.count_active(victim, images, labels, adversarial, boxes=boxes)
    assert count.tolist() == result.active[0].tolist() == [6, 4]


def test_a_detector_is_left_as_it_was():
    network = made(TWO_STAGE["FR-VGG"]).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    thresholds = (network.rpn.nms_thresh, network.rpn._post_nms_top_n["testing"])
    victim = victims.detector(network)
    images, boxes = some_images(), some_boxes()
    victim.dense_targets(images, min_score=0.0, confidence=0.0)
    labels, adversarial = aim(victim.eval(), images, boxes)
    victim.train()
    DAG(max_iter=2)(victim, images, labels, adversarial, boxes=boxes)
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert thresholds == (network.rpn.nms_thresh, network.rpn._post_nms_top_n["testing"])
    for key, value in network.state_dict().items():
        assert same_bits(value, before[key]) if value.is_floating_point() else True


# --- targets


def test_match():
    boxes = torch.tensor(
        [
            [0.0, 0, 10, 10],  # box 0 itself
            [0, 0, 10, 5],  # half of box 0
            [8, 0, 18, 10],  # 2 of 10 columns of box 0 (IoU 1/9), 8 of box 1's (2/3)
            [8, 0, 18, 10],  # likewise, but improbable for box 1's class
            [0, 9.5, 10, 20],  # IoU with box 0 below 0.1
            [50, 50, 60, 60],
        ]
    )
    truth = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10]])
    probabilities = torch.full((6, 4), 0.3)
    probabilities[3, 2] = 0.1  # not above
    labels = match(
        boxes,
        probabilities,
        truth,
        torch.tensor([3, 2]),
        min_iou=0.1,
        min_score=0.1,
        none=255,
    )
    assert labels.tolist() == [3, 3, 2, 3, 255, 255]
    strict = match(
        boxes, probabilities, truth, torch.tensor([3, 2]), min_iou=0.5, min_score=0.1, none=-1
    )
    assert strict.tolist() == [3, -1, 2, -1, -1, -1]  # 0.5 is not above 0.5


def test_dense_targets_are_the_region_networks_proposals():
    victim = victims.detector(made(TWO_STAGE["FR-VGG"]))
    images = some_images()
    truth = [
        {"boxes": torch.tensor([[10.0, 10, 60, 50]]), "labels": torch.tensor([2])},
        {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64)},
    ]
    dense, sparse = (
        victim.dense_targets(images, truth, nms_threshold=threshold, min_score=0.0)
        for threshold in (0.9, 0.5)
    )
    assert int(dense.counts[0]) > int(sparse.counts[0]) > 0
    assert int(dense.proposals[0]) > int(sparse.proposals[0])
    assert dense.counts[1] == 0
    assert dense.boxes.shape[1] % PADDED_TO == 0
    assert bool((dense.labels[0, : dense.counts[0]] == 2).all())
    assert bool((dense.labels[0, dense.counts[0] :] == 255).all())
    assert bool(dense.boxes[0, dense.counts[0] :].isnan().all())
    few = victim.dense_targets(images, truth, max_proposals=5, min_score=0.0)
    assert few.proposals.tolist() == [5, 5]
    result = DAG(max_iter=3)(
        victim, images, dense.labels, dense.adversarial_labels, boxes=dense.boxes
    )
    assert result.targets[1] == 0
    assert bool(result.converged[1])
    assert torch.equal(result.adversarial[1], images[1])


def test_without_objects_at_all():
    victim = victims.detector(made(TWO_STAGE["FR-ZF"]))
    images = some_images()
    nothing = {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64)}
    targets = victim.dense_targets(images, [nothing] * 2)
    assert targets.boxes.shape == (2, 0, 4)
    result = DAG(max_iter=3)(
        victim, images, targets.labels, targets.adversarial_labels, boxes=targets.boxes
    )
    assert torch.equal(result.adversarial, images)
    assert result.targets.tolist() == [0, 0]
    assert list(targets.samples(images))[1].key == 1
    none = victim.dense_targets(images[:0], [])
    assert none.boxes.shape == (0, 0, 4)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_crowds_give_no_targets(dtype):
    victim = victims.load("FR-ZF-07")
    (scene,) = Scenes("07", "test", count=1, first=2)  # four objects
    images = scene.image[None]

    def targets(**truth):
        return victim.dense_targets(images, [truth], adversarial="vanish")

    crowd = torch.tensor([1, 0, 0, 1]).to(dtype)
    kept = targets(boxes=scene.boxes[1:3], labels=scene.labels[1:3])
    found = targets(boxes=scene.boxes, labels=scene.labels, iscrowd=crowd)
    assert int(kept.counts) > 0
    assert torch.equal(found.labels, kept.labels)
    assert int(targets(boxes=scene.boxes, labels=scene.labels).counts) > int(kept.counts)


def test_detections_take_the_place_of_ground_truth():
    victim = victims.detector(made(TWO_STAGE["FR-VGG"]))
    images = some_images()
    with torch.no_grad():
        found = victim.detect(images)
    least = float(found[0]["scores"].max())
    best = [{key: value[one["scores"] >= least] for key, value in one.items()} for one in found]
    assert len(best[0]["boxes"]) == 1
    expected = victim.dense_targets(images, best, min_score=0.0, adversarial="vanish")
    targets = victim.dense_targets(images, min_score=0.0, confidence=least, adversarial="vanish")
    assert torch.equal(targets.labels, expected.labels)
    assert torch.equal(targets.adversarial_labels, expected.adversarial_labels)
    assert int(targets.counts[0]) > 0


@pytest.mark.parametrize("kind", ["permutation", "random", "vanish"])
def test_adversarial_labels(kind):
    scenes = list(Scenes("07", "test", count=4))
    images = torch.stack([scene.image for scene in scenes])
    torch.manual_seed(0)
    victim = victims.detector(zoo.build("FR-ZF-07", num_classes=13).eval())
    draw = lambda seed: victim.dense_targets(  # noqa: E731
        images, scenes, min_score=0.0, adversarial=kind, generator=generator(seed)
    )
    targets = draw(0)
    counted = targets.labels != 255
    assert int(counted.sum()) > 100
    labels, adversarial = targets.labels[counted], targets.adversarial_labels[counted]
    assert bool((targets.adversarial_labels[~counted] == 255).all())
    assert torch.equal(draw(0).adversarial_labels, targets.adversarial_labels)
    if kind == "vanish":
        assert bool((adversarial == 0).all())
        return
    assert not torch.equal(draw(1).adversarial_labels, targets.adversarial_labels)
    assert bool((adversarial != labels).all())
    assert int(adversarial.min()) >= 1
    assert int(adversarial.max()) <= 12
    goals = {
        (n, int(label)): set(targets.adversarial_labels[n][targets.labels[n] == label].tolist())
        for n in range(4)
        for label in targets.labels[n][counted[n]].unique()
    }
    single = [len(goal) == 1 for goal in goals.values()]
    assert all(single) if kind == "permutation" else not any(single)


def test_classes_that_a_data_set_left_unused_are_no_goals():
    network = made(TWO_STAGE["FR-ZF"])
    victim = victims.detector(network, classes=["__background__", "cat", "N/A", "dog", "N/A"])
    truth = [{"boxes": torch.tensor([[9.0, 9, 60, 60]]), "labels": torch.tensor([1])}]
    targets = victim.dense_targets(some_images(1), truth, min_score=0.0, adversarial="random")
    counted = targets.labels != 255
    assert int(counted.sum()) > 0
    assert set(targets.adversarial_labels[counted].tolist()) == {3}


BAD_BOXES = {
    "outside": ([[0.0, 0, 97, 50]], r"lie inside the image \(96 x 72 pixels\)"),
    "above": ([[0.0, -1, 9, 50]], r"lie inside the image \(96"),
    "degenerate": ([[5.0, 5, 5, 9]], r"have left < right and top < bottom"),
    "reversed": ([[5.0, 9, 8, 5]], r"have left < right and top < bottom"),
    "infinite": ([[0.0, 0, float("inf"), 5]], r"be finite"),
}


@pytest.mark.parametrize("fault", BAD_BOXES)
def test_bad_boxes(fault):
    boxes, message = BAD_BOXES[fault]
    victim = victims.detector(made(TWO_STAGE["FR-ZF"]))
    images = some_images(1)
    truth = [{"boxes": torch.tensor(boxes), "labels": torch.tensor([1])}]
    with pytest.raises(ValueError, match=rf"ground_truth\[0\] boxes must {message}.*, got \["):
        victim.dense_targets(images, truth)
    given = torch.tensor([[[1.0, 1, 9, 9], boxes[0]]])
    labels = torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match=rf"boxes must {message}.*, got \[.*\] at \[0, 1\]"):
        DAG()(victim, images, labels, labels, boxes=given)
    with pytest.raises(ValueError, match=rf"sample 'k': boxes must {message}"):
        list(DAG().stream(victim, [Sample(images[0], labels[0], boxes=given[0], key="k")]))


def test_nan_in_part_of_a_box_is_no_padding():
    with pytest.raises(ValueError, match="boxes must be finite"):
        victims.detector(made(TWO_STAGE["FR-ZF"])).check_boxes(
            torch.tensor([[[1.0, float("nan"), 9, 9]]]), some_images(1)
        )
    check_inside("boxes", torch.tensor([[0.0, 0, 96, 72]]), some_images(1))  # the whole image


GOOD = {"boxes": torch.tensor([[1.0, 1, 9, 9]]), "labels": torch.tensor([1])}
BAD_ARGUMENTS = [
    ({"ground_truth": []}, ValueError, "ground_truth must have an entry for each of 1 images"),
    ({"ground_truth": [{"boxes": GOOD["boxes"]}]}, ValueError, r"ground_truth\[0\] must have"),
    (
        {"ground_truth": [{**GOOD, "labels": torch.tensor([5])}]},
        ValueError,
        r"ground_truth\[0\] labels must be classes below 5 other than the background \(0\), got 5",
    ),
    ({"ground_truth": [{**GOOD, "labels": torch.tensor([0])}]}, ValueError, "got 0"),
    ({"ground_truth": [{**GOOD, "labels": torch.tensor([1, 2])}]}, ValueError, "labels must have"),
    ({"ground_truth": [{**GOOD, "iscrowd": torch.zeros(2).long()}]}, ValueError, "iscrowd must ha"),
    ({"ground_truth": [{**GOOD, "iscrowd": torch.zeros(1)}]}, TypeError, "iscrowd must"),
    ({"ground_truth": [{**GOOD, "boxes": torch.ones(1, 5)}]}, ValueError, r"shape \(K, 4\)"),
    ({"ground_truth": [{**GOOD, "boxes": [[1, 1, 9, 9]]}]}, TypeError, "boxes must be a torch"),
    ({"images": torch.rand(3, 9, 9)}, ValueError, "images must have shape"),
    ({"nms_threshold": 1.5}, ValueError, r"nms_threshold must lie in \[0, 1\], got 1.5"),
    ({"min_iou": "0.1"}, TypeError, "min_iou must be a number"),
    ({"max_proposals": 0}, ValueError, "max_proposals must be at least 1, got 0"),
    ({"adversarial": "circle"}, ValueError, "adversarial must be 'permutation'"),
    ({"ignore_index": 3}, ValueError, "ignore_index must not be one of the 5 classes, got 3"),
]


@pytest.mark.parametrize(("given", "kind", "message"), BAD_ARGUMENTS)
def test_bad_arguments_of_dense_targets(given, kind, message):
    victim = victims.detector(made(TWO_STAGE["FR-ZF"]))
    arguments = {"images": some_images(1), "ground_truth": [GOOD], **given}
    with pytest.raises(kind, match=message):
        victim.dense_targets(**arguments)


def test_bad_arguments_of_an_attack():
    victim = victims.detector(made(TWO_STAGE["FR-ZF"]))
    images, labels = some_images(1), torch.ones(1, 2, dtype=torch.int64)
    for boxes, kind, message in (
        (None, ValueError, "boxes must be given for a two-stage detector"),
        (torch.ones(1, 2, 5), ValueError, r"boxes must have shape \(1, P, 4\), got \(1, 2, 5\)"),
        (torch.ones(2, 2, 4), ValueError, "boxes must have"),
        (torch.ones(1, 2, 4, dtype=torch.int64), TypeError, "boxes must be"),
    ):
        with pytest.raises(kind, match=message):
            DAG()(victim, images, labels, labels, boxes=boxes)
    boxes = torch.tensor([[[1.0, 1, 9, 9]]])
    with pytest.raises(ValueError, match=r"labels must have shape \(1, 1\)"):
        DAG()(victim, images, labels, boxes=boxes)
    with pytest.raises(TypeError, match="network must be a detector of torchvision"):
        victims.detector(nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="rows must be at least 1"):
        victims.detector(made(TWO_STAGE["FR-ZF"]), rows=0)


# --- one stage


@pytest.mark.parametrize("name", ONE_STAGE)
def test_one_stage_scores_and_gradient(name):
    network = made(ONE_STAGE[name])
    victim = victims.detector(network)
    images = some_images()
    scores = victim(images)
    with torch.no_grad():
        transformed, _ = network.transform(list(images))
        features = list(network.backbone(transformed.tensors).values())
        logits = network.head(features)["cls_logits"].transpose(1, 2)
    first = 0 if name == "SSDlite" else 1  # the others have no background of their own
    assert scores.shape == logits.shape
    torch.testing.assert_close(scores[:, first:], logits[:, first:], rtol=1e-5, atol=1e-6)
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(victim(x)[:, 2].sum(), x)
    assert float(gradient.abs().max()) > 0
    assert torch.equal(victim(images, some_boxes()), scores)
    with pytest.raises(ValueError, match=r"boxes must have shape \(2, P, 4\), got \(2, 6\)"):
        DAG()(victim, images, torch.zeros(2, scores.shape[2]).long(), boxes=some_boxes()[..., 0])


@pytest.mark.parametrize("name", ["RetinaNet", "FCOS"])
def test_where_the_background_wins_nothing_is_detected(name):
    network = made(ONE_STAGE[name])
    network.nms_thresh = 1.0
    network.detections_per_img = network.topk_candidates = 100_000
    bias = network.head.classification_head.cls_logits.bias
    images = some_images()
    found = []
    for shift in (-2.0, 0.0, 2.0, 4.0):
        with torch.no_grad():
            bias.add_(shift)
            network.score_thresh = 0.3
            if name == "FCOS":  # every centre-ness 1, so that the bound is met
                network.head.regression_head.bbox_ctrness.bias.fill_(30.0)
                network.head.regression_head.bbox_ctrness.weight.zero_()
            winners = victims.detector(network)(images).argmax(1)
            detections = network(list(images))
        for n in range(2):
            labels = detections[n]["labels"]
            detected = int((labels > 0).sum())
            assert (detected > 0) == bool((winners[n] > 0).any())
            found.append(detected > 0)
        bias.data.sub_(shift)
    assert set(found) == {True, False}


@pytest.mark.parametrize("name", ONE_STAGE)
def test_one_stage_targets_and_attack(name):
    victim = victims.detector(made(ONE_STAGE[name]))
    images = some_images()
    truth = [
        {"boxes": torch.tensor([[10.0, 10, 60, 50]]), "labels": torch.tensor([2])},
        {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64)},
    ]
    targets = victim.dense_targets(images, truth, min_score=0.0, min_iou=0.0)
    assert all(sample.boxes is None for sample in targets.samples(images))
    anchors = victim(images).shape[2]
    assert targets.labels.shape == (2, anchors)
    assert targets.boxes.shape == (2, anchors, 4)
    assert targets.proposals.tolist() == [anchors] * 2
    assert int(targets.counts[0]) > 0
    assert targets.counts[1] == 0
    assert set(targets.labels.unique().tolist()) == {2, 255}
    labels, adversarial = aim(victim, images)
    results = [
        DAG(max_iter=2, backend=backend)(victim, images, labels, adversarial, boxes=targets.boxes)
        for backend in ("native", "reference")
    ]
    assert torch.equal(results[0].active, results[1].active)
    assert int(results[0].active[0].min()) > 0
    torch.testing.assert_close(results[0].adversarial, results[1].adversarial, rtol=0, atol=1e-6)


def test_a_single_anchor_vanishes():
    """The seed at the background's constant column sends nothing back; the object's does."""
    victim = victims.detector(made(ONE_STAGE["RetinaNet"]))
    images = some_images(1)
    with torch.no_grad():
        victim.network.head.classification_head.cls_logits.bias.fill_(-2.0)
        strongest = victim(images)[0, 1:].amax(0).argmax()
        label = int(victim(images)[0, :, strongest].argmax())
    assert label > 0
    labels = torch.full((1, victim(images).shape[2]), 255)
    labels[0, strongest] = label
    result = DAG(gamma=8 / 255, max_iter=100)(
        victim, images, labels, torch.where(labels == 255, 255, 0)
    )
    assert result.status[0] is dagcore.Status.CONVERGED
    assert int(result.iterations[0]) > 0
    with torch.no_grad():
        assert int(victim(result.adversarial)[0, :, strongest].argmax()) != label


def test_detr_queries():
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic"
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        num_labels=4,
        num_queries=7,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    torch.manual_seed(0)
    network = transformers.DetrForObjectDetection(config).eval()
    victim = victims.detector(network, shortest=64, longest=128)
    images = some_images()
    scores = victim(images)
    assert scores.shape == (2, 5, 7)
    assert victim.background == 4
    assert len(victim.classes) == 4
    assert victim.object_classes() == {name: k for k, name in enumerate(victim.classes)}
    with torch.no_grad():
        boxes = victim.candidates(images, 0.9, 9)[0][0]
    truth = [{"boxes": boxes[:1], "labels": torch.tensor([3])}] * 2
    targets = victim.dense_targets(images, truth, min_score=0.0)
    assert targets.labels.shape == (2, 7)
    assert targets.labels[0, 0] == 3
    assert int(targets.adversarial_labels[0, 0]) < 3
    vanish = victim.dense_targets(images, truth, min_score=0.0, adversarial="vanish")
    assert vanish.adversarial_labels[0, 0] == 4
    labels, adversarial = aim(victim, images)
    results = [
        DAG(max_iter=5, backend=backend)(victim, images, labels, adversarial)
        for backend in ("native", "reference")
    ]
    assert torch.equal(results[0].active, results[1].active)
    assert int(results[0].active[0].min()) == 7
    assert int(results[0].iterations.max()) > 0
    with torch.no_grad():
        found = victim.detect(images)
    assert all(bool((one["labels"] < 4).all()) for one in found)


# --- faster


@pytest.mark.parametrize("name", ["FR-ZF", "FR-VGG", "R-FCN"])
def test_boxes_of_the_same_cells_are_read_once(name):
    network = made(TWO_STAGE[name]).requires_grad_(False)
    rng = generator(4)
    # Multiples of half a cell, where rounding has to go the pooling's way.
    corner = torch.randint(0, 6, (1, 300, 2), generator=rng) * 8.0
    extent = torch.randint(1, 4, (1, 300, 2), generator=rng) * 8.0 + 0.1
    boxes = torch.cat([corner, (corner + extent)], -1).clamp(max=64.0)
    victim = victims.detector(network)
    sizes, x = [(64, 64)], torch.rand(1, 3, 64, 64, generator=rng)
    with torch.no_grad():
        maps = victim._pooled_from({"0": network.backbone(x)})
        seen = []
        network.roi_heads.box_head.register_forward_hook(lambda m, i, o: seen.append(len(o)))
        once = victim.read(maps, [boxes[0]], sizes)
        victim.distinct = False
        each = victim.read(maps, [boxes[0]], sizes)
    assert seen[0] < seen[1] == 300
    torch.testing.assert_close(once, each, rtol=1e-5, atol=1e-6)
    kept, again = without_repeats([boxes[0], boxes[0]], 16)
    assert [len(own) for own in kept] == [seen[0]] * 2
    assert torch.equal(again[300:], again[:300] + seen[0])


@pytest.mark.parametrize("name", TWO_STAGE)
def test_a_prepared_detector_is_the_same(name):
    network = made(TWO_STAGE[name])
    victim = victims.detector(network)
    images, boxes = some_images(), some_boxes()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    count = sum("BatchNorm" in type(module).__name__ for module in network.modules())
    prepared = victims.prepare(victim)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in prepared.modules())
    assert prepared.preparation.folded == count
    assert not prepared.preparation.left
    assert prepared.preparation.channels_last
    with torch.no_grad():
        torch.testing.assert_close(
            prepared(images, boxes), victim(images, boxes), rtol=1e-3, atol=1e-4
        )
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    labels, adversarial = aim(victim, images, boxes)
    result = DAG(max_iter=2)(prepared, images, labels, adversarial, boxes=boxes)
    assert int(result.iterations.min()) == 2
    with torch.no_grad():
        for found, expected in zip(prepared.detect(images), victim.detect(images), strict=True):
            assert found["boxes"].shape == expected["boxes"].shape
    nothing = [{"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64)}] * 2
    assert prepared.dense_targets(images, nothing).counts.tolist() == [0, 0]


def test_what_is_prepared_of_a_detector():
    victim = victims.detector(made(ONE_STAGE["SSDlite"]))
    prepared = victims.prepare(victim, example=torch.rand(1, 3, 40, 60))
    images = some_images(1)
    with torch.no_grad():
        torch.testing.assert_close(prepared(images), victim(images), rtol=1e-3, atol=1e-4)
    assert prepared.preparation.folded > 0
    assert victim.preparation is None
    for name in ("low_resolution", "bf16", "compile"):
        with pytest.raises(ValueError, match=f"{name} must not be set for a detector, got True"):
            victims.prepare(victim, **{name: True})
    left = victims.prepare(victim, fold_batch_norm=False, channels_last=False)
    assert left.preparation.folded == 0
    assert torch.equal(left(images), victim(images))


def test_detections_of_the_background_are_no_objects():
    network = made(ONE_STAGE["RetinaNet"])
    logits = network.head.classification_head.cls_logits
    with torch.no_grad():
        logits.bias.view(-1, CLASSES)[:, 0] = 9.0  # torchvision's own decoding would report class 0
    victim = victims.detector(network)
    with torch.no_grad():
        assert 0 in victim.detect(some_images(1))[0]["labels"]
    targets = victim.dense_targets(some_images(1), confidence=0.0, min_score=0.0)
    assert 0 not in targets.labels


class Own(victims.Detector):
    """A detector of the user's own, with a mistake."""

    has_own_targets = True

    def __init__(self, mistake):
        super().__init__(nn.Conv2d(3, CLASSES, 8, 8))
        self.mistake = mistake

    def forward(self, images, boxes=None):
        return self.network(images).flatten(2)

    def candidates(self, images, nms_threshold, max_proposals):
        scores = self(images).transpose(1, 2)
        boxes = torch.tensor([0.0, 0, 9, 9]).repeat(*scores.shape[:2], 1)
        if self.mistake == "images":
            return [(boxes[0], scores[0])]
        if self.mistake == "boxes":
            boxes = boxes.transpose(1, 2)
        if self.mistake == "scores":
            scores = scores.transpose(1, 2)
        return list(zip(boxes, scores, strict=True))

    def detect(self, images):
        return [{"boxes": b, "labels": s.argmax(1)} for b, s in self.candidates(images, 1, 1)]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("images", r"Own.candidates must return boxes and scores for each of 2 images, got 1"),
        ("boxes", r"Own.candidates must return boxes of shape \(P, 4\), got \(4, 108\)"),
        ("scores", r"Own.candidates must return scores of shape \(108, C\).*got \(5, 108\)"),
        ("detect", "Own.detect must return 'boxes', 'labels' and 'scores'.*got dict of 2: 'boxes'"),
    ],
)
def test_methods_of_the_users_own_are_named(mistake, message):
    with pytest.raises(ValueError, match=message):
        Own(mistake).dense_targets(some_images())


def test_a_plain_detector_is_not_prepared():
    with pytest.raises(
        TypeError, match=r"prepare\(victims.detector\(model\)\), got a plain Faster"
    ):
        victims.prepare(made(small_fpn))


def test_names_of_objects():
    network = made(TWO_STAGE["FR-ZF"])
    names = ["__background__", "cat", "N/A", "dog", "cow"]
    assert victims.detector(network).object_classes() is None
    assert victims.detector(network, names).object_classes() == {"cat": 1, "dog": 3, "cow": 4}


def test_looking_for_targets_leaves_a_detector_to_others():
    """While one thread has dense proposals made, another finds what it always finds."""
    victim = victims.load("FR-ZF-07")
    image = Scenes("07", "test", count=1)[0].image[None]
    inside, go_on = threading.Event(), threading.Event()
    with torch.no_grad():
        (alone,) = victim.detect(image)
    rpn = type(victim.network.rpn)
    forward = rpn.forward

    def slow(self, *given):
        if self.nms_thresh == 0.9:
            inside.set()
            go_on.wait(60)
        return forward(self, *given)

    rpn.forward = slow
    try:
        thread = threading.Thread(target=lambda: victim.dense_targets(image))
        thread.start()
        assert inside.wait(60)
        with torch.no_grad():
            (meanwhile,) = victim.detect(image)
        go_on.set()
        thread.join()
    finally:
        rpn.forward = forward
    for name, values in alone.items():
        assert torch.equal(values, meanwhile[name])
