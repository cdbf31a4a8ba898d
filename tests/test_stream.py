"""`DAG.stream`: results of images alone, whatever the slots; nothing lost, nothing kept."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dagcore
from dagcore import DAG, Result, Sample, Status

GAMMA = 0.03
TOLERANCE = 0.5


class Net(nn.Module):
    """A small network with weights fixed by a seed; its scores are at `stride` pixels."""

    def __init__(self, classes: int = 5, stride: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Conv2d(3, 8, 3, padding=1, stride=stride)
        self.second = nn.Conv2d(8, classes, 3, padding=1)
        for parameter in self.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.data = drawn if parameter.dim() > 1 else 0 * drawn
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.first(images - 0.5).tanh())


def samples(
    model: nn.Module, sizes: list[tuple[int, int]], kind: str | None = "runner-up"
) -> list[Sample]:
    """Random images, labelled as the model sees them."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for key, (height, width) in enumerate(sizes):
        image = torch.rand(3, height, width, generator=generator, dtype=torch.float64)
        scores = model(image[None])
        labels = dagcore.ops.argmax_bilinear(scores.detach(), (height, width))[0]
        made.append(Sample(image, labels, kind, key=key))
    return made


def alone(attack: DAG, model: nn.Module, sample: Sample, result: Result) -> Result:
    """The attack on a single sample, with the adversarial labels that the stream drew."""
    return attack(model, sample.image[None], sample.labels[None], result.adversarial_labels)


def assert_as_alone(attack: DAG, model: nn.Module, given: list[Sample], got: list[Result]) -> None:
    assert sorted(result.key for result in got) == [sample.key for sample in given]
    for result in got:
        expected = alone(attack, model, given[result.key], result)
        assert result.status == expected.status
        assert torch.equal(result.iterations, expected.iterations)
        assert torch.equal(result.active, expected.active)
        torch.testing.assert_close(result.adversarial, expected.adversarial)
        torch.testing.assert_close(result.perturbation, expected.perturbation)
        torch.testing.assert_close(result.perceptibility, expected.perceptibility)


@pytest.mark.parametrize("slots", [1, 3, 16])
@pytest.mark.parametrize("kind", ["runner-up", None, "random"])
@pytest.mark.parametrize("stride", [1, 2])
def test_results_are_those_of_each_image_alone(slots: int, kind: str | None, stride: int) -> None:
    model = Net(stride=stride)
    given = samples(model, [(8, 12)] * 7, kind)
    attack = DAG(gamma=GAMMA, max_iter=25, tolerance=TOLERANCE)
    got = list(attack.stream(model, given, slots))
    assert_as_alone(attack, model, given, got)
    assert len({int(result.iterations) for result in got}) > 1


def test_samples_may_start_where_another_attack_ended() -> None:
    model = Net()
    given = samples(model, [(8, 12), (8, 12), (6, 10)])
    short, long = DAG(gamma=GAMMA, max_iter=4), DAG(gamma=GAMMA, max_iter=9)
    begun = {result.key: result.adversarial[0] for result in short.stream(model, given, 2)}
    rest = [dataclasses.replace(sample, start=begun[sample.key]) for sample in given]
    for result in DAG(gamma=GAMMA, max_iter=5).stream(model, rest, 2):
        whole = alone(long, model, given[result.key], result)
        torch.testing.assert_close(result.adversarial, whole.adversarial)
        torch.testing.assert_close(result.perturbation, whole.perturbation)
    outside = dataclasses.replace(given[0], start=given[0].image + 1)
    with pytest.raises(ValueError, match="sample 0: start must lie within bounds"):
        list(short.stream(model, [outside]))


def test_images_leave_as_they_finish() -> None:
    model = Net()
    given = samples(model, [(8, 12)] * 6)
    attack = DAG(gamma=GAMMA, max_iter=25, tolerance=TOLERANCE)
    got = list(attack.stream(model, given, 6))
    finished = [int(result.iterations) for result in got]
    assert finished == sorted(finished)
    assert [result.key for result in got] != sorted(result.key for result in got)


def test_sizes_may_differ() -> None:
    model = Net()
    given = samples(model, [(8, 12), (9, 7), (8, 12), (5, 5), (9, 7), (6, 6), (8, 12)])
    attack = DAG(gamma=GAMMA, max_iter=15, tolerance=TOLERANCE)
    assert_as_alone(attack, model, given, list(attack.stream(model, given, 3)))


def test_random_labels_do_not_depend_on_slots() -> None:
    model = Net()
    given = samples(model, [(8, 12)] * 6, None)
    attack = DAG(gamma=GAMMA, max_iter=10)
    drawn = []
    for slots in (1, 4):
        generator = torch.Generator().manual_seed(5)
        got = sorted(attack.stream(model, given, slots, generator), key=lambda r: r.key)
        drawn.append(torch.cat([r.adversarial_labels for r in got]))
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_a_data_loader_is_a_source() -> None:
    model = Net()
    given = samples(model, [(8, 12)] * 5)
    loader: Any = torch.utils.data.DataLoader(given, batch_size=None, num_workers=0)
    attack = DAG(gamma=GAMMA, max_iter=10)
    assert_as_alone(attack, model, given, list(attack.stream(model, loader, 2)))


def test_the_source_is_read_no_further_than_needed() -> None:
    model = Net()
    given = samples(model, [(8, 12)] * 40)
    read: list[int] = []

    def source() -> Iterator[Sample]:
        for sample in given:
            read.append(sample.key)
            yield sample

    stream = DAG(gamma=GAMMA, max_iter=5).stream(model, source(), 2)
    next(stream)
    assert len(read) <= 2 + 2 + 2  # under attack, waiting, and in the thread's hands
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == 1 or not any(
        thread.name == "dagcore-feed" for thread in threading.enumerate()
    )


def test_finished_images_are_not_kept() -> None:
    model = Net()
    images: list[weakref.ref[Tensor]] = []
    labels = samples(model, [(8, 12)])[0].labels

    def source() -> Iterator[Sample]:
        for _ in range(12):
            image = torch.rand(3, 8, 12, dtype=torch.float64)
            images.append(weakref.ref(image))
            yield Sample(image, labels, "runner-up")

    alive = []
    for result in DAG(gamma=GAMMA, max_iter=2).stream(model, source(), 2):
        del result
        alive.append(sum(image() is not None for image in images))
    assert max(alive) <= 2 + 2 + 2


def test_an_error_of_the_source_loses_no_result() -> None:
    model = Net()
    given = samples(model, [(8, 12)] * 5)

    def source() -> Iterator[Sample]:
        yield from given[:4]
        raise OSError("disk gone")

    attack = DAG(gamma=GAMMA, max_iter=15, tolerance=TOLERANCE)
    got = collect_until_error(attack, model, source(), OSError)
    assert_as_alone(attack, model, given[:4], got)


def collect_until_error(
    attack: DAG, model: nn.Module, source: Any, error: type[BaseException]
) -> list[Result]:
    got: list[Result] = []
    with pytest.raises(error):
        got.extend(attack.stream(model, source, 2))
    return got


def test_a_bad_sample_loses_no_result() -> None:
    model = Net()
    given = samples(model, [(8, 12)] * 4)
    bad = Sample(given[3].image * 300, given[3].labels, key="too bright")
    attack = DAG(gamma=GAMMA, max_iter=15, tolerance=TOLERANCE)
    got = collect_until_error(attack, model, [*given[:3], bad], ValueError)
    assert_as_alone(attack, model, given[:3], got)
    with pytest.raises(ValueError, match="sample 'too bright': images must lie within bounds"):
        list(attack.stream(model, [bad]))
    with pytest.raises(TypeError, match=r"samples must be dagcore.Sample, got Tensor"):
        list(attack.stream(model, [given[0].image]))  # type: ignore[list-item]
    labels = torch.full_like(given[0].labels, 77)
    with pytest.raises(ValueError, match=r"labels must lie in .* got 77"):
        list(attack.stream(model, [Sample(given[0].image, labels)]))


def test_an_error_of_the_network_loses_no_result() -> None:
    model = Net()
    given = samples(model, [(8, 12)] * 6)
    attack = DAG(gamma=GAMMA, max_iter=15, tolerance=TOLERANCE)
    first = min(int(r.iterations) for r in attack.stream(model, given[:2], 2))

    class Failing(Net):
        calls = 0

        def forward(self, images: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > first + 3:
                raise RuntimeError("out of memory")
            return super().forward(images)

    failing = Failing()
    failing.train()
    got = collect_until_error(attack, failing, given, RuntimeError)
    assert got
    assert failing.training
    assert all(parameter.requires_grad for parameter in failing.parameters())
    for result in got:
        expected = alone(attack, model, given[result.key], result)
        assert torch.equal(result.active, expected.active)


def test_model_is_put_back_when_the_stream_ends_or_is_closed() -> None:
    model = Net().train()
    given = samples(model, [(8, 12)] * 4)
    attack = DAG(gamma=GAMMA, max_iter=3)
    list(attack.stream(model, given))
    assert model.training
    stream = attack.stream(model, given, 1)
    next(stream)
    assert not model.training
    stream.close()  # type: ignore[attr-defined]
    assert model.training


def test_statuses_and_an_empty_source() -> None:
    model = Net()
    attack = DAG(gamma=GAMMA, max_iter=0)
    (result,) = attack.stream(model, samples(model, [(8, 12)]))
    assert result.status == (Status.BUDGET,)
    assert result.active.shape == (1, 1)
    assert list(attack.stream(model, [])) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slots": 0}, "slots must be at least 1, got 0"),
        ({"slots": 2.5}, "slots must be an integer, got 2.5"),
        ({"generator": 3}, "generator must be a torch.Generator, got int"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        DAG().stream(Net(), [], **arguments)


def test_the_reference_does_not_stream() -> None:
    with pytest.raises(ValueError, match="backend must be 'native' to stream, got 'reference'"):
        DAG(backend="reference").stream(Net(), [])


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("goal", ["leave", "reach"])
def test_low_resolution_scores_are_those_of_the_enlarged_network(
    align_corners: bool, goal: str
) -> None:
    model = Net(stride=2)

    class Enlarged(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.interpolate(
                model(images), images.shape[2:], mode="bilinear", align_corners=align_corners
            )

    images = torch.rand(2, 3, 11, 14, dtype=torch.float64, generator=torch.manual_seed(2))
    labels = Enlarged()(images).argmax(1)
    adversarial = (labels + 1) % 5
    model.align_corners = align_corners  # type: ignore[assignment]
    attack = DAG(gamma=GAMMA, max_iter=10, goal=goal, tolerance=0.2)
    low = attack(model, images, labels, adversarial)
    high = attack(Enlarged(), images, labels, adversarial)
    assert torch.equal(low.active, high.active)
    torch.testing.assert_close(low.adversarial, high.adversarial)
    of_reference = DAG(**{**vars(attack), "backend": "reference"})(
        model, images, labels, adversarial
    )
    assert torch.equal(low.active, of_reference.active)
    torch.testing.assert_close(low.adversarial, of_reference.adversarial)
    last = torch.stack([low.active[m, n] for n, m in enumerate(low.iterations.tolist())])
    assert torch.equal(attack.count_active(model, low.adversarial, labels, adversarial), last)


@pytest.mark.parametrize("slots", [1, 3])
def test_a_callback_hears_of_the_active_targets_of_every_image(slots: int) -> None:
    model = Net()
    given = samples(model, [(8, 8), (8, 8), (6, 9), (8, 8), (6, 9)])
    heard: dict[Any, list[int]] = {sample.key: [] for sample in given}

    def hear(keys: list[Any], active: Tensor) -> None:
        assert len(keys) == len(active) <= slots
        for key, count in zip(keys, active.tolist(), strict=True):
            if count >= 0:
                heard[key].append(count)

    attack = DAG(gamma=GAMMA, max_iter=20)
    for result in attack.stream(model, given, slots=slots, callback=hear):
        known = [count for count in result.active[:, 0].tolist() if count >= 0]
        assert heard[result.key] == known
        assert len(known) == int(result.iterations) + 1


@pytest.mark.parametrize("slots", [1, 3])
def test_a_source_may_use_its_buffers_again(slots: int) -> None:
    model = Net()
    given = samples(model, [(8, 10)] * 5)
    image, labels = torch.empty(3, 8, 10, dtype=torch.float64), torch.empty(8, 10).long()

    def source() -> Iterator[Sample]:
        for one in given:
            image.copy_(one.image)
            labels.copy_(one.labels)
            yield Sample(image, labels, "runner-up", key=one.key)

    attack = DAG(gamma=GAMMA, max_iter=20)
    found = {result.key: result for result in attack.stream(model, source(), slots=slots)}
    for one in given:
        expected = attack(model, one.image[None], one.labels[None], "runner-up")
        torch.testing.assert_close(found[one.key].adversarial, expected.adversarial)
        torch.testing.assert_close(found[one.key].perturbation, expected.perturbation)
        assert torch.equal(found[one.key].active, expected.active)


def test_scores_that_are_known_save_the_first_evaluation() -> None:
    model = Net()
    (sample,) = samples(model, [(8, 10)])
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    leaf = sample.image[None].clone().requires_grad_()
    known = dataclasses.replace(sample, known=(leaf, model(leaf)))
    attack = DAG(gamma=GAMMA, max_iter=3)
    (expected,) = attack.stream(model, [sample], slots=1)
    without = len(calls)
    (result,) = attack.stream(model, [known], slots=1)
    assert len(calls) - without == without - 2  # the hook saw `model(leaf)` too
    assert torch.equal(result.adversarial, expected.adversarial)
    assert torch.equal(result.active, expected.active)
    # The scores of another image are not taken for this one's.
    other = dataclasses.replace(known, image=sample.image * 0.9)
    (result,) = attack.stream(model, [other], slots=1)
    (expected,) = attack.stream(model, [dataclasses.replace(other, known=None)], slots=1)
    assert torch.equal(result.adversarial, expected.adversarial)


@pytest.mark.parametrize("slots", [2, 3])
def test_a_label_out_of_range_leaves_the_images_before_it_alone(slots: int) -> None:
    model = Net()
    given = samples(model, [(8, 10)] * 4)
    wrong = given[3].labels.clone()
    wrong[0, 0] = 77
    given[3] = dataclasses.replace(given[3], labels=wrong, adversarial_labels="permutation")
    given = [dataclasses.replace(one, adversarial_labels="permutation") for one in given]
    found: list[int] = []
    results = DAG(gamma=GAMMA, max_iter=20).stream(model, given, slots=slots)
    with pytest.raises(ValueError, match=r"labels must lie in .* got 77"):
        found.extend(result.key for result in results)
    assert sorted(found) == [0, 1, 2]


def test_a_callback_hears_nothing_of_an_image_that_had_the_slot_before() -> None:
    model = Net()
    given = samples(model, [(8, 10)] * 6)
    heard: dict[Any, list[int]] = {}

    def hear(keys: list[Any], active: Tensor) -> None:
        for key, count in zip(keys, active.tolist(), strict=True):
            heard.setdefault(key, []).append(count)

    results = DAG(gamma=GAMMA, max_iter=20).stream(model, given, slots=2, callback=hear)
    histories = {r.key: [n for n in r.active[:, 0].tolist() if n >= 0] for r in results}
    assert heard == histories
