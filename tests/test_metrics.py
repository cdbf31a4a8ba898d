from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex

from dagcore.metrics import (
    AveragePrecision,
    DetectionErrors,
    ErrorCounts,
    MeanIoU,
    Score,
    mean_iou,
    worst_iou,
)

VOID = 255


def maps(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


# --- mean IoU


def test_mean_iou_by_hand() -> None:
    # Truth   0 0 1 v    prediction 0 1 1 2    class 0: 1 right, 2 true, 1 predicted: 1/2
    #         2 1 v 1               0 1 0 1    class 1: 3 right, 3 true, 4 predicted: 3/4
    #                                          class 2: 0 right, 1 true (void hides one): 0
    # The second row's first pixel is predicted 0: class 0 has 2 predicted, so 1/3.
    # Class 3 never occurs. Mean (1/3 + 3/4 + 0) / 3 = 13/36.
    truth = maps([0, 0, 1, VOID], [2, 1, VOID, 1])
    predicted = maps([0, 1, 1, 2], [0, 1, 0, 1])
    score = mean_iou([predicted], [truth], 4)
    assert score.per_class[:3] == pytest.approx((100 / 3, 75, 0))
    assert math.isnan(score.per_class[3])
    assert score.mean == pytest.approx(1300 / 36)


def test_mean_iou_counts_pixels_of_the_whole_set() -> None:
    # Class 1: 1 of 1 in the first image, 0 of 4 in the second: 1/5 over the set, not their mean.
    # Class 0: 1 right, 1 true, 5 predicted: 1/5.
    measure = MeanIoU(2)
    measure.update(maps([1, 0]), maps([1, 0]).byte())
    measure.update(maps([0, 0, 0, 0]), maps([1, 1, 1, 1]).int())
    assert measure.compute() == Score((pytest.approx(20), pytest.approx(20)), pytest.approx(20))


def test_a_class_that_is_only_predicted_counts() -> None:
    assert mean_iou([maps([0, 1])], [maps([0, 0])], 3).mean == pytest.approx(25)


@pytest.mark.parametrize("void", [VOID, -1, 2])
def test_mean_iou_is_that_of_torchmetrics(void: int) -> None:
    rng = torch.Generator().manual_seed(0)
    predicted, truth = torch.randint(0, 5, (2, 4, 9, 7), generator=rng)
    truth[torch.rand(truth.shape, generator=rng) < 0.2] = void
    theirs = MulticlassJaccardIndex(5, average="none", ignore_index=void)
    theirs.update(predicted, truth)
    expected = [math.nan if c == void else 100 * float(s) for c, s in enumerate(theirs.compute())]
    found = mean_iou(predicted, truth, 5, void=void)
    assert found.per_class[:2] == pytest.approx(expected[:2])
    assert found.per_class[3:] == pytest.approx(expected[3:])
    assert found.per_class[2] == (0 if void == 2 else pytest.approx(expected[2]))


def test_mean_iou_of_nothing_is_no_number() -> None:
    assert math.isnan(mean_iou([maps([0, 1])], [maps([VOID, VOID])], 2).mean)
    assert math.isnan(MeanIoU(2).compute().mean)


def test_mean_iou_refuses() -> None:
    measure = MeanIoU(3)
    with pytest.raises(ValueError, match=r"predictions must lie in \[0, 3\), got 0 to 3"):
        measure.update(maps([0, 3]), maps([0, 0]))
    with pytest.raises(ValueError, match=r"masks must lie in \[0, 3\) or equal ignore_index=255"):
        measure.update(maps([0, 0]), maps([0, 3]))
    with pytest.raises(ValueError, match=r"predictions must have shape \(1, 2\) to match masks"):
        measure.update(maps([0, 0, 0]), maps([0, 0]))
    with pytest.raises(TypeError, match="predictions must be uint8, int32 or int64, got float32"):
        measure.update(torch.zeros(1, 2), maps([0, 0]))
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        MeanIoU(1)
    with pytest.raises(ValueError, match="predictions and masks must have the same length"):
        mean_iou([maps([0])], [], 2)
    assert math.isnan(measure.compute().mean)  # what was refused left nothing behind


# --- the worst case of several attacks


def seen_maps(attacks: int, images: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """What attacks leave of some images, (A, N, P), and what is true, (N, P), void in parts."""
    rng = torch.Generator().manual_seed(seed)
    true = torch.randint(classes, (images, 12), generator=rng)
    right = torch.rand((attacks, images, 1), generator=rng) > torch.rand(
        (attacks, images, 12), generator=rng
    )
    seen = torch.where(right, true, torch.randint(classes, right.shape, generator=rng))
    return seen, torch.where(torch.rand(true.shape, generator=rng) < 0.1, VOID, true)


def counted(seen: Tensor, true: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    one = torch.nn.functional.one_hot
    is_true = one(torch.where(true == VOID, classes, true), classes + 1)[..., :classes]
    is_seen = one(seen, classes) * (true != VOID)[..., None]
    return (is_seen * is_true).sum(-2), is_seen.sum(-2), is_true.sum(-2)


def of_choice(choice: Tensor, seen: Tensor, true: Tensor, classes: int) -> Score:
    picked = [seen[a, n][None] for n, a in enumerate(choice.tolist())]
    return mean_iou(picked, list(true[:, None]), classes)


@pytest.mark.parametrize("seed", range(8))
def test_the_worst_case_against_all_choices(seed: int) -> None:
    """At most what each attack leaves, at least the worst of all choices, and no single change of
    an image's attack makes it worse."""
    attacks, images, classes = 3, 5, 4
    seen, true = seen_maps(attacks, images, classes, seed)
    found = worst_iou(*counted(seen, true, classes), least_gain=0)
    assert found.score == of_choice(found.choice, seen, true, classes)
    every = {
        choice: of_choice(torch.tensor(choice), seen, true, classes).mean
        for choice in itertools.product(range(attacks), repeat=images)
    }
    assert min(every.values()) <= found.score.mean
    assert found.score.mean <= min(every[(a,) * images] for a in range(attacks))
    for n, a in itertools.product(range(images), range(attacks)):
        other = tuple(a if k == n else own for k, own in enumerate(found.choice.tolist()))
        assert every[other] >= found.score.mean - 1e-9


def test_the_worst_case_of_independent_images_is_found() -> None:
    """Where each image has a class of its own, each takes the attack that leaves it least."""
    true = torch.arange(4)[:, None].expand(4, 10)
    left = torch.tensor([[9, 1, 5, 7], [2, 8, 6, 3], [4, 4, 0, 5]])
    wrong = torch.full((), 4)
    seen = torch.where(torch.arange(10) < left[..., None], true, wrong)
    for begin in (None, 0, 1, 2):
        for generator in (None, torch.Generator().manual_seed(0)):
            found = worst_iou(*counted(seen, true, 5), begin=begin, generator=generator)
            assert found.choice.tolist() == [1, 0, 2, 1]
            assert found.score.per_class == pytest.approx((20, 10, 0, 30, 0))
            assert found.score.mean == pytest.approx(12)


def test_a_round_that_gains_too_little_is_the_last() -> None:
    seen, true = seen_maps(3, 40, 6, 0)
    counts = counted(seen, true, 6)
    rounds = [worst_iou(*counts, begin=0, least_gain=gain).rounds for gain in (0, 1)]
    assert rounds[0] > rounds[1] == 1
    seen, true = seen_maps(5, 12, 3, 1)
    counts = counted(seen, true, 3)

    def drawn(seed: int) -> tuple[int, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(worst_iou(*counts, begin=0, generator=generator).choice.tolist())

    assert len({drawn(seed) for seed in range(6)}) > 1  # the order of the images matters
    assert drawn(3) == drawn(3)


def test_the_worst_case_of_nothing() -> None:
    seen, true = seen_maps(2, 3, 4, 0)
    none = worst_iou(*counted(seen, torch.full_like(true, VOID), 4))
    assert math.isnan(none.score.mean)
    assert none.choice.tolist() == [0, 0, 0]
    empty = worst_iou(*(t[..., :0, :] for t in counted(seen, true, 4)))
    assert math.isnan(empty.score.mean)
    assert empty.choice.tolist() == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hits": torch.zeros(2, 3, 4)}, "hits must be .*, got float32"),
        (
            {"hits": torch.zeros(3, 4, dtype=torch.int64)},
            r"hits must have 3 dimensions, got \(3, 4\)",
        ),
        ({"predicted": torch.ones(2, 3, 5).long()}, r"predicted must have shape \(2, 3, 4\)"),
        ({"true": torch.ones(4, 4).long()}, r"true must have shape \(3, 4\)"),
        (
            {"true": torch.zeros(3, 4).long()},
            "hits must be at least 0 and at most predicted and true",
        ),
        ({"begin": 2}, "begin must be .* 1"),
        ({"least_gain": -1}, "least_gain must be a finite number of at least 0, got -1"),
    ],
)
def test_the_worst_case_refuses(change: dict, told: str) -> None:
    one = torch.ones(2, 3, 4).long()
    given = {"hits": one, "predicted": 2 * one, "true": 2 * one[0], "begin": None, "least_gain": 0}
    given |= change
    with pytest.raises((TypeError, ValueError), match=told):
        worst_iou(**given)


# --- average precision

TRUTH = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]])
MISS = [60.0, 60, 70, 70]


def found(*detections: tuple[list[float], float], label: int = 1) -> dict[str, Tensor]:
    return {
        "boxes": torch.tensor([box for box, _ in detections]).reshape(-1, 4),
        "scores": torch.tensor([score for _, score in detections]),
        "labels": torch.full((len(detections),), label),
    }


def box(k: int) -> list[float]:
    return TRUTH[k].tolist()


def ap(protocol: str, prediction: dict[str, Tensor], count: int, *difficult: int) -> float:
    measure = AveragePrecision(2, protocol=protocol)
    flags = torch.zeros(count, dtype=torch.bool)
    flags[list(difficult)] = True
    labels = torch.ones(count, dtype=torch.int64)
    measure.update(prediction, TRUTH[:count], labels, flags)
    score = measure.compute()
    assert math.isnan(score.per_class[0])
    return score.mean


@pytest.mark.parametrize(
    ("protocol", "expected"),
    # Three detections, two truths; in the order of scores right, wrong, right.
    # Precision 1 at recall 1/2 and 2/3 at recall 1.
    # 2007: recalls 0 to 0.5 (6 of them) have 1, 0.6 to 1 (5) have 2/3.
    # 2010: 1/2 * 1 + 1/2 * 2/3. COCO: recalls 0 to 0.50 (51) have 1, the other 50 have 2/3.
    [
        ("voc2007", (6 + 5 * 2 / 3) / 11),
        ("voc2010", 5 / 6),
        ("coco", (51 + 50 * 2 / 3) / 101),
    ],
)
def test_average_precision_by_hand(protocol: str, expected: float) -> None:
    prediction = found((box(1), 0.3), (box(0), 0.9), (MISS, 0.5))
    assert ap(protocol, prediction, 2) == pytest.approx(100 * expected)


@pytest.mark.parametrize(
    ("protocol", "expected"),
    # In the order of scores: right, again the same box (wrong), right, wrong, wrong; the third
    # box is not found. Precision 1 at recall 1/3, 2/3 at recall 2/3, nothing above.
    # 2007: recalls 0 to 0.3 (4) have 1, 0.4 to 0.6 (3) have 2/3.
    # 2010: 1/3 * 1 + 1/3 * 2/3. COCO: 0 to 0.33 (34) have 1, 0.34 to 0.66 (33) have 2/3.
    [
        ("voc2007", (4 + 3 * 2 / 3) / 11),
        ("voc2010", 5 / 9),
        ("coco", (34 + 33 * 2 / 3) / 101),
    ],
)
def test_a_second_detection_of_a_box_is_wrong(protocol: str, expected: float) -> None:
    prediction = found((box(0), 0.9), (box(0), 0.8), (box(1), 0.7), (MISS, 0.6), (box(0), 0.5))
    assert ap(protocol, prediction, 3) == pytest.approx(100 * expected)


@pytest.mark.parametrize("protocol", ["voc2007", "voc2010", "coco"])
def test_a_better_precision_later_counts_before(protocol: str) -> None:
    # Wrong, right, right: precision 1/2 at recall 1/2, 2/3 at recall 1: 2/3 everywhere.
    prediction = found((MISS, 0.9), (box(0), 0.8), (box(1), 0.7))
    assert ap(protocol, prediction, 2) == pytest.approx(200 / 3)


@pytest.mark.parametrize("protocol", ["voc2007", "voc2010", "coco"])
def test_difficult_boxes_count_neither_way(protocol: str) -> None:
    # Box 0 is difficult: both detections of it vanish, and one true box is left, found at once.
    prediction = found((box(0), 0.9), (box(0), 0.8), (box(1), 0.7))
    assert ap(protocol, prediction, 2, 0) == pytest.approx(100)
    # Not found, it costs nothing either.
    assert ap(protocol, found((box(1), 0.7)), 2, 0) == pytest.approx(100)
    # With nothing but difficult boxes there is no score.
    assert math.isnan(ap(protocol, prediction, 2, 0, 1))


@pytest.mark.parametrize("protocol", ["voc2007", "voc2010", "coco"])
@pytest.mark.parametrize(
    ("left", "expected"),
    # By its left edge a detection of 20 x 20 is in the crowd, half in it, or less. Where it counts
    # the first detection is wrong and the second right: precision 1/2 everywhere.
    [(120.0, 100), (90.0, 100), (89.9, 50), (60.0, 50)],
)
def test_detections_in_a_crowd_count_neither_way(
    protocol: str, left: float, expected: float
) -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [100, 100, 200, 200]])
    crowd = torch.tensor([False, True])
    measure = AveragePrecision(3, protocol=protocol)
    inside = [left, 120, left + 20, 140]
    prediction = found((inside, 0.9), ([0.0, 0, 10, 10], 0.8), ([130.0, 130, 150, 150], 0.95))
    measure.update(prediction, boxes, torch.tensor([1, 1]), iscrowd=crowd)
    # Class 2 has a crowd alone: no score.
    measure.update(found((inside, 0.9), label=2), boxes[1:], torch.tensor([2]), iscrowd=crowd[1:])
    score = measure.compute()
    assert score.per_class[1] == pytest.approx(expected)
    assert math.isnan(score.per_class[2])


@pytest.mark.parametrize("protocol", ["voc2007", "voc2010", "coco"])
def test_a_crowd_takes_what_no_box_of_its_class_has(protocol: str) -> None:
    # The box lies in the crowd. Found, it is right; found again, the crowd has it. The crowd is
    # none of class 2, whose detection there is wrong, before the right one.
    boxes = torch.tensor([[110.0, 110, 120, 120], [100, 100, 200, 200], [0, 0, 10, 10]])
    box, away = boxes[0].tolist(), boxes[2].tolist()
    found_boxes = torch.tensor([box, box, box, away])
    prediction = {
        "boxes": found_boxes,
        "labels": torch.tensor([1, 1, 2, 2]),
        "scores": torch.tensor([0.9, 0.8, 0.7, 0.6]),
    }
    measure = AveragePrecision(3, protocol=protocol)
    crowd = torch.tensor([False, True, False])
    measure.update(prediction, boxes, torch.tensor([1, 1, 2]), iscrowd=crowd)
    assert measure.compute().per_class[1:] == pytest.approx((100, 50))


@pytest.mark.parametrize("protocol", ["voc2007", "voc2010", "coco"])
@pytest.mark.parametrize(("width", "expected"), [(5.0, 100), (4.9, 0)])
def test_an_overlap_of_one_half_is_enough(protocol: str, width: float, expected: float) -> None:
    assert ap(protocol, found(([0, 0, width, 10], 0.9)), 1) == pytest.approx(expected)


@pytest.mark.parametrize("protocol", ["voc2007", "voc2010", "coco"])
def test_classes_images_and_the_mean(protocol: str) -> None:
    # Class 1: its only box found. Class 2: one of two, in an image of its own, and the detection
    # there in a false class. Class 3: a detection and no box, no score. Class 4: a box, not found.
    measure = AveragePrecision(6, protocol=protocol)
    measure.update(found((box(0), 0.9)), TRUTH[:2], torch.tensor([1, 2]))
    measure.update(found((box(0), 0.4), label=2), TRUTH[:2], torch.tensor([2, 4]).int())
    measure.update(found((box(0), 0.8), label=3), TRUTH[:0], torch.tensor([], dtype=torch.int64))
    measure.update(found(), TRUTH[:0], torch.tensor([], dtype=torch.int64))
    half = {"voc2007": 600 / 11, "voc2010": 50, "coco": 5100 / 101}[protocol]
    score = measure.compute()
    assert score.per_class == pytest.approx(
        (math.nan, 100, half, math.nan, 0, math.nan), nan_ok=True
    )
    assert score.mean == pytest.approx((100 + half) / 3)


def test_voc_holds_a_detection_to_the_box_it_overlaps_most() -> None:
    # Both detections overlap box 0 most, by 9/11 and 7/13; the second overlaps box 1 by
    # 7/13 * 0.99 or so as well. VOC: wrong. COCO: it gets the box that is still free.
    boxes = torch.tensor([[0.0, 0, 10, 10], [6.1, 0, 16.1, 10]])
    prediction = found(([1.0, 0, 11, 10], 0.9), ([3.0, 0, 13, 10], 0.8))
    for protocol, expected in (("voc2010", 50), ("coco", 100)):
        measure = AveragePrecision(2, protocol=protocol)
        measure.update(prediction, boxes, torch.tensor([1, 1]))
        assert measure.compute().mean == pytest.approx(expected)


@pytest.mark.parametrize("protocol", ["voc2007", "voc2010", "coco"])
def test_average_precision_of_nothing_is_no_number(protocol: str) -> None:
    assert math.isnan(AveragePrecision(3, protocol=protocol).compute().mean)


def test_average_precision_refuses() -> None:
    with pytest.raises(ValueError, match="protocol must be 'voc2007', 'voc2010' or 'coco'"):
        AveragePrecision(3, protocol="voc")
    measure = AveragePrecision(3)
    ones = torch.tensor([1])
    good = found((box(0), 0.9))
    with pytest.raises(ValueError, match=r"prediction must have 'scores', got \['boxes', 'labels'"):
        measure.update({key: good[key] for key in ("boxes", "labels")}, TRUTH[:1], ones)
    with pytest.raises(ValueError, match=r"labels must lie in \[1, 3\), got \[3\]"):
        measure.update(good, TRUTH[:1], torch.tensor([3]))
    with pytest.raises(ValueError, match=r"prediction\['labels'\] must lie in \[1, 3\), got \[0\]"):
        measure.update({**good, "labels": torch.tensor([0])}, TRUTH[:1], ones)
    with pytest.raises(ValueError, match=r"boxes must have shape \(K, 4\), got \(4,\)"):
        measure.update(good, TRUTH[0], ones)
    with pytest.raises(ValueError, match=r"difficult must have shape \(1,\) to match boxes"):
        measure.update(good, TRUTH[:1], ones, torch.tensor([True, False]))
    with pytest.raises(ValueError, match=r"iscrowd must have shape \(1,\) to match boxes"):
        measure.update(good, TRUTH[:1], ones, iscrowd=torch.tensor([True, False]))
    with pytest.raises(ValueError, match=r"prediction\['scores'\] must be numbers, got NaN"):
        measure.update({**good, "scores": torch.tensor([math.nan])}, TRUTH[:1], ones)
    assert math.isnan(measure.compute().mean)  # what was refused left nothing behind


# --- kinds of detection errors


def counts(**kinds: int) -> ErrorCounts:
    """Counts, 0 where nothing is said."""
    return ErrorCounts(**{field.name: 0 for field in dataclasses.fields(ErrorCounts)} | kinds)


def one(place: list[float], label: int, score: float = 0.9) -> dict[str, Tensor]:
    return found((place, score), label=label)


def together(*predictions: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.cat([p[key] for p in predictions]) for key in predictions[0]}


def errors(prediction: dict[str, Tensor], labels: list[int], **flags: Tensor) -> ErrorCounts:
    """Of detections beside the first boxes of TRUTH with these labels."""
    measure = DetectionErrors(4)
    measure.update(
        prediction, TRUTH[: len(labels)], torch.tensor(labels, dtype=torch.int64), **flags
    )
    return measure.compute()


@pytest.mark.parametrize(
    ("place", "label", "kind", "missed"),
    # By its right edge a detection covers part of box 0 (10 x 10, of class 1): the width tells the
    # IoU. Box 1 is of class 2.
    [
        ([0.0, 0, 5, 10], 1, "correct", 1),  # 0.5
        ([0.0, 0, 4.9, 10], 1, "localisation", 1),
        ([0.0, 0, 1, 10], 1, "localisation", 1),  # 0.1
        ([0.0, 0, 0.9, 10], 1, "background", 2),
        ([0.0, 0, 5, 10], 3, "classification", 1),
        ([0.0, 0, 5, 10], 2, "classification", 1),
        ([0.0, 0, 4.9, 10], 3, "both", 2),
        ([0.0, 0, 1, 10], 2, "both", 2),
        ([0.0, 0, 0.9, 10], 3, "background", 2),
        (MISS, 1, "background", 2),
    ],
)
def test_each_kind_of_error(place: list[float], label: int, kind: str, missed: int) -> None:
    """Box 1 is missed; box 0 too, unless the place or the class alone is wrong."""
    assert errors(one(place, label), [1, 2]) == counts(**{kind: 1}, missed=missed, objects=2)


def test_a_further_detection_is_a_duplicate() -> None:
    """The best score is right, in whatever order; the box of another class there is not asked."""
    first, second = one([0.0, 0, 6, 10], 1, 0.6), one(box(0), 1, 0.9)
    expected = counts(correct=1, duplicate=1, objects=1)
    assert errors(together(first, second), [1]) == expected
    measure = DetectionErrors(4)
    twice = TRUTH[[0, 0]]
    measure.update(together(first, second), twice, torch.tensor([1, 2]))
    assert measure.compute() == counts(correct=1, duplicate=1, missed=1, objects=2)


def test_the_class_is_wrong_rather_than_the_place() -> None:
    """Of class 1 at a box of class 2, beside one of class 1 that it overlaps by 0.2 or so."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [6, 0, 16, 10]])
    measure = DetectionErrors(3)
    measure.update(one(boxes[1].tolist(), 1), boxes, torch.tensor([1, 2]))
    assert measure.compute() == counts(classification=1, missed=1, objects=2)


def test_an_object_that_is_found_is_not_missed_for_its_errors() -> None:
    prediction = together(one(box(0), 1), one(box(0), 2), one([0.0, 0, 3, 10], 1))
    expected = counts(correct=1, classification=1, localisation=1, objects=1)
    assert errors(prediction, [1]) == expected


def test_difficult_objects_and_crowds_in_errors() -> None:
    """Neither is missed. At a difficult box or in a crowd of its class, nothing counts."""
    first = torch.tensor([True, False])
    for flags in ({"difficult": first}, {"iscrowd": first}):
        assert errors(one(box(0), 1), [1, 2], **flags) == counts(missed=1, objects=1)
        assert errors(found(), [1, 2], **flags) == counts(missed=1, objects=1)
    # Of another class it counts, as an error of class at a difficult object, but not at a crowd.
    wrong = one(box(0), 3)
    assert errors(wrong, [1, 2], difficult=first) == counts(classification=1, missed=1, objects=1)
    assert errors(wrong, [1, 2], iscrowd=first) == counts(background=1, missed=1, objects=1)


def test_errors_of_low_score_do_not_count() -> None:
    prediction = together(one(box(0), 1, 0.5), one(MISS, 1, 0.49), one(box(1), 1, 0.49))
    assert errors(prediction, [1, 1]) == counts(correct=1, missed=1, objects=2)
    measure = DetectionErrors(4, min_score=0.0)
    measure.update(prediction, TRUTH[:2], torch.tensor([1, 1]))
    assert measure.compute() == counts(correct=2, background=1, objects=2)


def test_errors_of_a_data_set() -> None:
    """Images add up, and boxes of one are nothing to another."""
    measure = DetectionErrors(4)
    labels = torch.tensor([1])
    measure.update(together(one(box(0), 1), one(box(0), 1)), TRUTH[:1], labels)
    measure.update(one(box(0), 1), TRUTH[:1], labels)
    measure.update(found(), TRUTH[:1], labels)
    measure.update(one(box(0), 2), TRUTH[:0], labels[:0])
    result = measure.compute()
    assert result == counts(correct=2, duplicate=1, background=1, missed=1, objects=3)
    assert result.detections == 4
    assert result.shares == {
        "correct": 50,
        "classification": 0,
        "localisation": 0,
        "both": 0,
        "duplicate": 25,
        "background": 25,
        "missed": pytest.approx(100 / 3),
    }
    assert all(math.isnan(share) for share in DetectionErrors(4).compute().shares.values())


def test_detection_errors_refuse() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        DetectionErrors(1)
    with pytest.raises(TypeError, match="min_score must be a number, got"):
        DetectionErrors(3, min_score="0.5")  # type: ignore[arg-type]
    measure = DetectionErrors(3)
    with pytest.raises(ValueError, match=r"labels must lie in \[1, 3\), got \[3\]"):
        measure.update(found(), TRUTH[:1], torch.tensor([3]))
    assert measure.compute() == counts()
