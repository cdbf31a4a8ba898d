"""The engine on a device that is ahead of the host: `LateDevice` stands in for a GPU.

Whatever comes late, results are those of the synchronous engine to the last bit. What finds which
fault (`test_devices` has those of the calls to torch.cuda):

    work outside of the device's block, or the block around the caller  a_stream, a_batch, always
    a value read where that waits; a label check at each admission      a_stream, a_label
    rows replaced, or closed up, under a graph                          a_stream, a_batch
    a graph of slots that are not full, or before EAGER iterations      iterations_of_full
    counts of an image that had the slot before, out of order or early  a_stream, a_batch
    an iteration that does nothing; an image that never stops           a_replay, an_image
    tags, samples, slots or the network kept after the end              nothing, free, slots_end
"""

from __future__ import annotations

import collections
import contextlib
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from late_device import LateDevice
from support import generator
from torch import Tensor, nn

from dagcore import (
    APGD,
    DAG,
    PGD,
    ALMAProx,
    Part,
    Result,
    Sample,
    SegPGD,
    joint_attack,
    joint_stream,
    universal_perturbation,
)
from dagcore.attacks import base
from dagcore.attacks.base import open_slots
from dagcore.attacks.schedules import UntilFooled
from dagcore.attacks.steps import NormalisedStep
from dagcore.engine.loop import EAGER, Evaluation, Slots
from dagcore.engine.networks import Targets
from dagcore.engine.readback import LAG
from dagcore.losses import DAGObjective
from dagcore.perturbation import round_to_8_bits

PROPERTY = settings(
    max_examples=30,
    phases=[Phase.generate],  # a failure is told at once
)
SIZE = (6, 8)
CLASSES = 4


class Net(nn.Module):
    """A network whose arithmetic is the same in any batch: sums and products of channels."""

    def __init__(self, stride: int = 1, seed: int = 1) -> None:
        super().__init__()
        self.stride = stride
        weights = torch.randn(CLASSES, 4, generator=generator(seed), dtype=torch.float64)
        self.weights = nn.Parameter(weights)
        self.device: LateDevice | None = None
        self.calls: list[tuple[int, bool]] = []  # images, and whether it is being captured

    def forward(self, images: Tensor) -> Tensor:
        if self.device is not None:
            self.device.require()
            self.calls.append((len(images), self.device.capturing))
        r, g, b = (images - 0.5).unbind(1)
        scores = [w[0] * r + w[1] * g + w[2] * b * r + 0.1 * w[3] for w in self.weights]
        return torch.stack(scores, 1)[..., :: self.stride, :: self.stride]


def samples(count: int, kind: str | None = "runner-up", sizes: Iterable[Any] = (SIZE,)) -> list:
    """Images on 8-bit levels, of more contrast and less, labelled as `Net()` sees them."""
    rng, sizes, made = generator(2), list(sizes), []
    for key in range(count):
        size = sizes[key % len(sizes)]
        image = torch.rand(3, *size, generator=rng, dtype=torch.float64)
        image = round_to_8_bits(0.5 + (image[None] - 0.5) * (0.2 + 0.1 * (key * 3 % 8)))[0]
        labels = Net()(image[None])[0].argmax(0)
        made.append(Sample(image, labels, kind, key=key))
    return made


def assert_same(got: Result, expected: Result) -> None:
    assert got.status == expected.status
    for name in (
        "adversarial",
        "perturbation",
        "iterations",
        "active",
        "targets",
        "perceptibility",
        "last",
        "left",
    ):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    assert (got.loss is None) == (expected.loss is None)
    if got.loss is not None and expected.loss is not None:
        assert torch.equal(got.loss.nan_to_num(0.5), expected.loss.nan_to_num(0.5))
    for own, of in zip(*map(_maps, (got, expected)), strict=True):
        assert torch.equal(own, of) if isinstance(own, Tensor) else own == of


def _maps(result: Result) -> tuple[Tensor | str, ...]:
    aims = result.adversarial_labels
    return aims if isinstance(aims, tuple) else (aims,)


class Arriving:
    """In the place of the thread that fetches samples: they are there when `arrivals` says so."""

    def __init__(self, samples: Iterable[Sample], device: Any, arrivals: Iterator[bool]) -> None:
        self.samples, self.device, self.arrivals = iter(samples), device, arrivals
        self.error: BaseException | None = None

    def next(self, wait: float | None) -> Sample | None:
        if wait is not None and not next(self.arrivals):
            return None
        sample = next(self.samples, None)
        return None if sample is None else sample.with_tensors(self.device.kept)

    def close(self) -> None:
        pass


def arriving(arrivals: list[bool]) -> Callable[..., Arriving]:
    def repeated() -> Iterator[bool]:
        while True:
            yield from arrivals

    return lambda samples, ahead, device: Arriving(samples, device, repeated())


class Case(NamedTuple):
    """How a stream comes and how late its device is."""

    late: list[int]
    arrivals: list[bool]
    count: int
    slots: int
    kind: str | None
    stride: int
    max_iter: int
    tolerance: float
    levels: int | None
    refuses: bool
    sizes: list[tuple[int, int]]
    attack: str

    def build(self) -> DAG | PGD | APGD | ALMAProx:
        if self.attack == "alma":
            share = 1 - self.tolerance
            return ALMAProx(steps=self.max_iter + 1, alpha=0.02, decay=0.5, share=share)
        own: dict[str, Any] = {"tolerance": self.tolerance, "levels": self.levels}
        if self.attack == "dag":
            return DAG(gamma=0.02, max_iter=self.max_iter, **own)
        own |= {"epsilon": 0.15, "restarts": 1 + self.max_iter % 3}
        steps = min(self.max_iter, 8)
        if self.attack == "apgd":
            steps += 3
            return APGD(steps=steps, loss="margin", radii=[None, "shrinking"][steps % 2], **own)
        kind = SegPGD if self.attack == "segpgd" else PGD
        return kind(steps=steps, alpha=0.04, momentum=0.5 * (steps % 2), **own)


CASES = st.builds(
    Case,
    late=st.lists(st.integers(0, LAG + 2), min_size=1, max_size=6),
    arrivals=st.lists(st.booleans(), max_size=6).map(lambda drawn: [*drawn, True]),
    count=st.integers(1, 7),
    slots=st.integers(1, 4),
    kind=st.sampled_from(["runner-up", None, "random"]),
    stride=st.sampled_from([1, 2]),
    max_iter=st.integers(0, 25),
    tolerance=st.sampled_from([0.0, 0.1, 0.4]),
    levels=st.sampled_from([None, 256]),
    refuses=st.booleans(),
    sizes=st.sampled_from([[SIZE], [SIZE, SIZE, (4, 10)]]),
    attack=st.sampled_from(["dag", "dag", "pgd", "segpgd", "apgd", "alma"]),
)


@pytest.mark.filterwarnings("ignore:the model cannot be captured:RuntimeWarning")
@PROPERTY
@given(CASES)
def test_a_stream_is_that_of_the_synchronous_engine(case: Case) -> None:
    model = Net(case.stride)
    kind = case.kind if case.attack == "dag" or case.kind != "runner-up" else "untargeted"
    given, attack = samples(case.count, kind, case.sizes), case.build()
    expected = {r.key: r for r in attack.stream(model, given, 1, generator(5))}
    heard: dict[int, list[int]] = {sample.key: [] for sample in given}

    def hear(keys: list[int], active: Tensor) -> None:
        for key, count in zip(keys, active.tolist(), strict=True):
            if count >= 0:
                heard[key].append(count)

    device = model.device = LateDevice(case.late, refuses=case.refuses)
    found: dict[int, Result] = {}
    with device.installed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "Prefetcher", arriving(case.arrivals))
        results: Any = attack.stream(model, given, case.slots, generator(5), callback=hear)
        with contextlib.closing(results):
            for result in results:
                assert not device.is_current  # of the caller
                assert result.key not in found
                found[result.key] = result
                known = [count for count in result.active[:, 0].tolist() if count >= 0]
                told = heard[result.key]
                if attack.restarts == 1:
                    assert told == known  # each count once, in order
                else:  # of the run that was best
                    assert any(told[k : k + len(known)] == known for k in range(len(told)))
    assert found.keys() == expected.keys()
    for key, result in found.items():
        assert_same(result, expected[key])


@pytest.mark.filterwarnings("ignore:the model cannot be captured:RuntimeWarning")
@PROPERTY
@given(
    late=st.lists(st.integers(0, LAG + 2), min_size=1, max_size=6),
    count=st.integers(1, 5),
    max_iter=st.integers(0, 12),
    refuses=st.booleans(),
    joint=st.booleans(),
)
def test_a_batch_is_that_of_the_synchronous_engine(
    late: list[int], count: int, max_iter: int, refuses: bool, joint: bool
) -> None:
    nets = [Net(seed=seed) for seed in range(1 + joint)]
    given = samples(count)
    images = torch.stack([sample.image for sample in given])
    labels = torch.stack([sample.labels for sample in given])
    attack = DAG(gamma=0.02, max_iter=max_iter, tolerance=0.2)
    heard: list[Tensor] = []

    def run() -> Result:
        heard.clear()
        parts = [Part(net, labels, "runner-up") for net in nets]
        return joint_attack(attack, parts, images, callback=lambda _, a: heard.append(a.clone()))

    expected, told = run(), []
    told = list(heard)
    device = LateDevice(late, refuses=refuses)
    for net in nets:
        net.device = device
    device.hidden.add(images)
    device.hidden.add(labels)
    with device.installed():
        assert_same(run(), expected)
    assert not device.is_current
    assert len(heard) == len(told)
    assert all(map(torch.equal, heard, told))


@pytest.mark.parametrize("refuses", [False, True])
def test_iterations_of_full_slots_are_captured_after_a_few(refuses: bool) -> None:
    model = Net()
    device = model.device = LateDevice((2,), refuses=refuses)
    attack = DAG(gamma=1e-4, max_iter=20)
    given = samples(8)
    arrivals = [False, False, True]  # slots fill up slowly
    with device.installed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "Prefetcher", arriving(arrivals))
        stream = attack.stream(model, given, 3)
        if refuses:
            with pytest.warns(RuntimeWarning, match=r"CUDA graph \(operation not permitted.*ing\)"):
                results = list(stream)
        else:
            results = list(stream)
    assert len(results) == len(given)
    full = [capturing for count, capturing in model.calls if count == 3]
    assert len(model.calls) - len(full) > EAGER  # of slots that are not full
    assert (True in full) == (not refuses)
    if refuses:
        assert len(full) > 3 * EAGER
    else:  # from then on the model is not called
        assert full == [False] * EAGER + [True]
        assert model.calls[-1] == (3, True)


def test_a_universal_perturbation_is_that_of_the_synchronous_engine() -> None:
    model = Net()
    given = samples(7, None, [SIZE, (4, 10)])
    for max_iter in (1, 5, 30):
        attack = DAG(gamma=0.02, max_iter=max_iter, epsilon=0.2, tolerance=0.3)
        model.device = None
        expected = universal_perturbation(attack, model, given, 2, generator(3))
        device = model.device = LateDevice()
        with device.installed():
            result = universal_perturbation(attack, model, given, 2, generator(3))
        assert_same(result, expected)
        assert not device.is_current


@pytest.mark.parametrize("kind", [None, "random", "runner-up"])
@pytest.mark.parametrize("bad", [0, 3, 5])
def test_a_label_out_of_range_is_told_late_and_loses_no_result(bad: int, kind: str | None) -> None:
    model = Net()
    given = samples(6, kind)
    attack = DAG(gamma=0.02, max_iter=15, tolerance=0.2)
    expected = {r.key: r for r in attack.stream(model, given, 1, generator(5))}
    given[bad].labels[2, 3] = 99
    device = model.device = LateDevice()
    found: list[Result] = []
    with device.installed(), pytest.raises(ValueError, match=r"labels must lie in .* got 99"):
        found.extend(attack.stream(model, given, 2, generator(5)))
    assert bad not in {result.key for result in found}
    assert set(range(bad)) <= {result.key for result in found}
    for result in found:
        assert_same(result, expected[result.key])


def test_a_label_out_of_range_at_one_of_two_networks_ends_the_image() -> None:
    nets = [Net(seed=seed) for seed in range(2)]
    attack = DAG(gamma=0.02, max_iter=9)
    given = [
        Sample(sample.image, [sample.labels, sample.labels.clone()], "runner-up", key=sample.key)
        for sample in samples(2)
    ]
    given[1].labels[1][2, 3] = 99
    with LateDevice().installed() as device:
        nets[0].device = device
        parts = [Part(net) for net in nets]
        stream = joint_stream(attack, parts, given, 2)
        assert next(stream).key == 0
        with pytest.raises(ValueError, match=r"labels must lie in .* got 99"):
            next(stream)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_network_is_always_run_under_the_device(backend: str) -> None:
    model, sample = Net(), samples(1)[0]
    attack = DAG(gamma=0.02, max_iter=3, backend=backend)
    with LateDevice().installed() as model.device:
        images, labels = sample.image[None], sample.labels[None]
        result = attack(model, images, labels, "runner-up")
        attack.count_active(model, result.adversarial, labels, "runner-up")
    assert len(model.calls) >= 5


def test_a_function_is_attacked_on_the_device_of_the_samples() -> None:
    model = Net()
    admitted: list[int] = []

    class Rule(DAGObjective):
        def count(self, num_classes: int, labels: Tensor, adversarial: Tensor | str) -> Tensor:
            device.require()
            admitted.append(len(labels))
            return super().count(num_classes, labels, adversarial)

    class Attack(DAG):
        def objective(self) -> DAGObjective:
            return Rule()

    given = samples(4)
    with LateDevice().installed() as device:
        model.device = device
        results = list(Attack(max_iter=3).stream(lambda images: model(images), given, 2))
    assert len(results) == sum(admitted) == len(given)


class Key:
    """A tag that can be watched."""


def test_nothing_is_kept_of_images_that_have_finished() -> None:
    model = Net()
    networks = [weakref.ref(model)]
    device = LateDevice((0, 3, 1))
    given = samples(12, None)
    watched: list[tuple[weakref.ref[Key], weakref.ref[Tensor]]] = []

    def source() -> Iterator[Sample]:
        for sample in given:
            image, key = sample.image.clone(), Key()
            watched.append((weakref.ref(key), weakref.ref(image)))
            yield Sample(image, sample.labels, key=key)

    with LateDevice().installed():  # what torch does at first keeps frames, and what is in them
        list(DAG(gamma=0.02, max_iter=1).stream(Net(), source(), 3))
    watched.clear()
    gc.disable()  # what is kept in a circle is kept
    try:
        with device.installed(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(base, "Prefetcher", arriving([True]))
            stream = DAG(gamma=0.02, max_iter=6).stream(model, source(), 3)
            del model
            for _ in range(6):
                next(stream)
            alive = [key() is not None for key, _ in watched]
            assert sum(alive) <= 3 + 3  # under attack, and finished in one iteration with the last
            assert sum(image() is not None for _, image in watched) <= 1  # in the source's hands
            assert len(device.copies) > 12
            assert not any(copy() is not None for copy in device.copies)  # all is in the slots
            collections.deque(stream, maxlen=0)
            assert len(watched) == 12
            assert not any(key() or image() is not None for key, image in watched)
            del stream
            assert networks[0]() is None  # nor of the slots, which know their network
    finally:
        gc.enable()


@contextlib.contextmanager
def on_device(late: list[int] | None) -> Iterator[None]:
    """The CPU as it is, or a device that is so late in its place."""
    if late is None:
        yield
        return
    with LateDevice(late).installed() as device, device.current():
        yield


@pytest.mark.parametrize("late", [None, [2]])
def test_a_free_slot_keeps_no_tag(late: list[int] | None) -> None:
    given = samples(2)
    images, labels = torch.stack([given[0].image] * 2), torch.stack([given[0].labels] * 2)
    labels[0] = 255  # done at once
    attack = DAG(gamma=1e-9, max_iter=10**4)
    targets = Targets(labels, lambda labels, classes: (labels + 1) % classes)
    with on_device(late):
        slots = open_slots(attack, [attack.network(Net())], images, [targets])
        slots.tags[:] = tags = [Key(), Key()]
        watched = [weakref.ref(tag) for tag in tags]
        tags.clear()
        finished: list[Any] = []
        while not finished:
            slots.iterate()
            finished = slots.collect()
    assert finished[0].tag is watched[0]()
    finished.clear()
    assert watched[0]() is None
    assert watched[1]() is not None


def test_slots_end_with_the_attack() -> None:
    slots = [weakref.ref(_begun(LateDevice(), iterations=EAGER + 2))]
    assert slots[0]() is None  # without a look for circles


def _begun(device: LateDevice, iterations: int) -> Slots:
    with device.installed(), device.current():
        slots = _slots(samples(2))
        iterate(slots, iterations)
    return slots


def _slots(given: list[Sample], report: Any = None) -> Slots:
    model = Net()
    images = torch.stack([sample.image for sample in given])
    labels = torch.stack([sample.labels for sample in given])
    attack = DAG(gamma=1e-9, max_iter=10**4)
    targets = Targets(labels, lambda labels, classes: (labels + 1) % classes)
    return open_slots(attack, [attack.network(model)], images, [targets], None, report)


def test_the_host_is_not_further_behind_than_it_may_be() -> None:
    heard: list[int] = []
    device = LateDevice((10**6,))
    with device.installed(), device.current():
        slots = _slots(samples(2), lambda iteration, *_: heard.append(iteration))
        for iteration in range(10):
            slots.iterate()
            assert not slots.finished()
            assert heard == list(range(iteration + 1 - LAG))
        slots.finished(wait=True)
    assert heard == list(range(10))


def test_a_replay_that_does_nothing_is_an_error() -> None:
    model = Net()
    attack = DAG(gamma=1e-4, max_iter=100)
    sample = samples(1)[0]
    with LateDevice(dead=True).installed() as device:
        model.device = device
        with pytest.raises(RuntimeError, match="did nothing when it was replayed"):
            attack(model, sample.image[None], sample.labels[None], "runner-up")
        with pytest.raises(RuntimeError, match="did nothing when it was replayed"):
            list(attack.stream(model, [sample], 1))


class Undecided:
    """Evaluates an image as neither done nor worth a step."""

    networks, capturable, states, tells_loss = 1, True, (), False

    def advance(self, state: Any) -> None:
        pass

    def evaluate(self, state: Any, may_move: Tensor, *, synchronous: bool) -> Evaluation:
        none = torch.zeros_like(may_move)
        return Evaluation(none.int()[:, None], none, none, None)


@pytest.mark.parametrize("late", [None, [3]])
def test_an_image_that_never_stops_is_an_error(late: list[int] | None) -> None:
    image = torch.zeros(3, 2, 2)
    told = r"after 25 evaluations, but max_iter=5 and patience=2 allow 24"
    with on_device(late):
        slots = Slots(Undecided(), NormalisedStep(0.1), UntilFooled(5, patience=2), 1, image)
        slots.admit([None], image[None])
        with pytest.raises(RuntimeError, match=told):
            iterate(slots, 100)


def iterate(slots: Slots, count: int) -> None:
    for _ in range(count):
        slots.iterate()
        assert not slots.collect()
