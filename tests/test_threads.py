"""Attacks in several threads and in forked workers, and what many of them leave behind."""

from __future__ import annotations

import gc
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support import generator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dagcore import DAG, Part, Result, Sample, freed_memory_kept, joint_attack, labels, ops
from dagcore.engine import freeze, frozen, memory
from dagcore.ops import native

WAIT = 60  # seconds, for what never happens


class Net(nn.Module):
    """A network whose scores in training mode depend on chance and on the whole batch."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Tanh(),
            nn.Dropout(0.5),
            nn.Conv2d(8, 5, 1),
        )
        for parameter in self.parameters():
            drawn = torch.randn(parameter.shape, generator=generator(seed))
            parameter.data = drawn if parameter.dim() > 1 else drawn.abs()
        self.layers[4].weight.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.layers(images)
        return scores


def images_and_labels(model: nn.Module, count: int = 3) -> tuple[Tensor, Tensor]:
    images = torch.rand(count, 3, 12, 16, generator=generator(1))
    with frozen(model), torch.no_grad():
        return images, model(images).argmax(1)


def assert_as_it_was(model: nn.Module) -> None:
    assert all(module.training for module in model.modules())
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, _ in model.named_parameters()} - {"layers.4.weight"}
    assert model.layers[1].num_batches_tracked == 0


def in_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(WAIT)


def assert_same(got: list[Result], expected: list[Result]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.status == other.status
        assert one.key == other.key
        assert torch.equal(one.active, other.active)
        assert torch.equal(one.adversarial, other.adversarial)


class Turns:
    """Lets two threads take turns: `pause` hands over and waits for the other's pause or end."""

    def __init__(self) -> None:
        self.turn = threading.Condition()
        self.current = 0
        self.ended: set[int] = set()

    def start(self, me: int) -> None:
        with self.turn:
            assert self.turn.wait_for(lambda: self.current == me or 1 - me in self.ended, WAIT)

    def pause(self, me: int) -> None:
        with self.turn:
            self.current = 1 - me
            self.turn.notify_all()
        self.start(me)

    def end(self, me: int) -> None:
        with self.turn:
            self.ended.add(me)
            self.current = 1 - me
            self.turn.notify_all()


Attack = Callable[[Callable[[], None]], "list[Result]"]  # pauses after each update or result


def called(model: nn.Module, max_iter: int) -> Attack:
    images, own = images_and_labels(model)

    def run(pause: Callable[[], None]) -> list[Result]:
        attack = DAG(max_iter=max_iter)
        return [attack(model, images, own, "runner-up", callback=lambda *_: pause())]

    return run


def streamed(model: nn.Module, max_iter: int) -> Attack:
    images, own = images_and_labels(model, 2 + max_iter)
    samples = [Sample(*pair, "runner-up", key=k) for k, pair in enumerate(zip(images, own))]  # noqa: B905

    def run(pause: Callable[[], None]) -> list[Result]:
        got = []
        for result in DAG(max_iter=max_iter).stream(model, samples, slots=2):
            got.append(result)
            pause()
        return got

    return run


@pytest.mark.parametrize("shared", [True, False], ids=["one model", "two models"])
@pytest.mark.parametrize("second", [called, streamed])
@pytest.mark.parametrize("first", [called, streamed])
def test_two_threads_find_what_each_finds_alone(
    first: Callable[..., Attack], second: Callable[..., Attack], shared: bool
) -> None:
    models = [Net(0), Net(0 if shared else 1)]
    if shared:
        models[1] = models[0]
    attacks = [first(models[0], 3), second(models[1], 9)]  # the first ends while the second runs
    alone = [in_thread(lambda attack=attack: attack(lambda: None)) for attack in attacks]
    turns = Turns()

    def run(me: int) -> list[Result]:
        turns.start(me)
        try:
            return attacks[me](lambda: turns.pause(me))
        finally:
            turns.end(me)

    with ThreadPoolExecutor(2) as pool:
        together = [done.result(WAIT) for done in [pool.submit(run, me) for me in (0, 1)]]
    for got, expected in zip(together, alone, strict=True):
        assert_same(got, expected)
    assert len(together[0][0].active) < len(together[1][0].active)
    for model in models:
        assert_as_it_was(model)


def test_many_threads_at_once() -> None:
    model = Net()
    images, own = images_and_labels(model)
    attack = DAG(max_iter=20)
    expected = in_thread(lambda: attack(model, images, own, "runner-up"))
    start = threading.Barrier(4)

    def run() -> list[Result]:
        start.wait(WAIT)
        return [attack(model, images, own, "runner-up") for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(run) for _ in range(4)]:
            assert_same(done.result(WAIT), [expected] * 5)
    assert_as_it_was(model)


def test_models_that_share_a_module() -> None:
    model = Net()
    wrapped = nn.Sequential(model)
    outer, inner = frozen(model), frozen(wrapped)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)  # not the order of a stack
    assert not any(module.training for module in wrapped.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    inner.__exit__(None, None, None)
    assert wrapped.training
    assert_as_it_was(model)


class Merging(nn.Module):
    """A layer that merges its weights in eval mode, as those of low-rank adapters do."""

    def __init__(self, *inside: nn.Module) -> None:
        super().__init__()
        self.inside = nn.Sequential(*inside)
        self.weight = nn.Parameter(torch.ones(()))
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if self.merged is mode:
            self.weight.data += -1.0 if mode else 1.0
            self.merged = not mode
        return self


def test_a_networks_own_train_is_called() -> None:
    inner = Merging(nn.Dropout(), nn.BatchNorm2d(3))
    model = nn.Sequential(Merging(inner), nn.Dropout())
    inner.inside[1].eval()  # a batch norm that is not to be trained
    before = {name: module.training for name, module in model.named_modules()}
    with frozen(model):
        assert model[0].merged
        assert inner.merged
        assert float(inner.weight.data) == 2
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not model[0].merged
    assert not inner.merged
    assert float(inner.weight.data) == 1
    model.eval()
    with frozen(model):
        assert float(inner.weight.data) == 2
    assert inner.merged


def test_a_networks_own_train_waits_for_who_holds_what_is_inside() -> None:
    inner = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    outer = Merging(inner)
    first, second = frozen(inner), frozen(outer)
    first.__enter__()
    second.__enter__()
    second.__exit__(None, None, None)
    assert outer.merged
    assert not any(module.training for module in inner.modules())
    first.__exit__(None, None, None)
    assert not outer.merged
    assert [module.training for module in inner.modules()] == [True, True, False]
    assert not freeze._held


class Refusing(nn.Module):
    """A module that cannot be put into one of the modes."""

    def __init__(self, refused: bool) -> None:
        super().__init__()
        self.refused: bool | None = refused

    def train(self, mode: bool = True) -> Refusing:
        if mode is self.refused:
            raise RuntimeError("not in this mode")
        super().train(mode)
        return self


@pytest.mark.parametrize("refused", [True, False])
def test_a_module_that_fails_leaves_the_others_as_they_were(refused: bool) -> None:
    model = nn.Sequential(Net(), Refusing(refused), Net())
    with pytest.raises(RuntimeError, match="not in this mode"), frozen(model):
        assert refused
    for net in (model[0], model[2]):
        assert_as_it_was(net)
    assert model.training
    assert model[1].training
    assert not freeze._held


def test_a_model_made_in_inference_mode_is_left_as_it_was() -> None:
    with torch.inference_mode():
        model = Net()
    images, own = images_and_labels(model)
    assert_as_it_was(model)
    with pytest.raises(ValueError, match=r"under torch\.inference_mode"):
        DAG(max_iter=1)(model, images, own)
    assert_as_it_was(model)
    assert not freeze._held


def test_a_joint_attack_names_a_model_twice() -> None:
    model = Net()
    images, own = images_and_labels(model)
    joint_attack(DAG(max_iter=1), [Part(model, own), Part(model, own)], images)
    assert_as_it_was(model)


def test_memory_is_kept_until_the_last_thread_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []

    class Module:
        keep_freed_memory = staticmethod(kept.append)

    for name in (*memory._MALLOC_SETTINGS, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(native, "module", Module)
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with freed_memory_kept():
            inside.set()
            assert leave.wait(WAIT)

    with ThreadPoolExecutor(1) as pool:
        with freed_memory_kept():
            done = pool.submit(other)
            assert inside.wait(WAIT)
        assert kept == [True]
        leave.set()
        done.result(WAIT)
    assert kept == [True, False]


# --- workers


class Made(Dataset[Sample]):
    """Samples whose labels the ops find, in whatever process asks for them."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, k: int) -> Sample:
        if k >= len(self):
            raise IndexError(k)
        image = torch.rand(3, 24, 32, generator=generator(k))
        scores = torch.randn(1, 5, 12, 16, generator=generator(k))
        own = ops.argmax_bilinear(scores, (24, 32))
        aim = labels.assign("random", own, 5, generator=generator(k))
        assert isinstance(aim, Tensor)
        seed, active = ops.dag_seed_bilinear(scores, own, aim)
        assert int(active) == 24 * 32
        ops.linf_step_(
            seed, seed.clone(), seed.clone(), active, gamma=1, lower=None, upper=None, epsilon=None
        )
        return Sample(image, own[0], aim[0], key=k)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 and later: threads
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # on one core
def test_forked_workers_use_the_ops_after_their_parent_has(
    one_and_two_threads: tuple[int, int],
) -> None:
    torch.set_num_threads(max(one_and_two_threads))
    scores = torch.randn(2, 21, 64, 64, generator=generator(0))
    own = ops.argmax_bilinear(scores, (512, 512))  # large: the threads are there when it forks
    ops.dag_seed_bilinear(scores, own, "runner-up")
    model, attack = Net().eval(), DAG(max_iter=4)
    found = []
    for workers in ({}, {"num_workers": 2, "multiprocessing_context": "fork", "timeout": WAIT}):
        loader: Any = DataLoader(Made(), batch_size=None, **workers)
        found.append(list(attack.stream(model, loader, slots=1)))
    assert len(found[0]) == 8
    assert_same(found[1], found[0])


# --- many


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_is_steady_over_many_images(one_and_two_threads: tuple[int, int]) -> None:
    torch.set_num_threads(min(one_and_two_threads))
    model, attack = Net(), DAG(max_iter=2)
    sizes = ((48, 64), (64, 48), (40, 40), (56, 72), (33, 65))  # some 40 kB an image

    def source(count: int) -> Iterator[Sample]:
        for k in range(count):
            height, width = sizes[k // 3 % len(sizes)]
            own = torch.randint(0, 5, (height, width), generator=generator(k))
            yield Sample(torch.rand(3, height, width, generator=generator(k)), own, "random", key=k)

    def round_of_attacks() -> None:
        for result in attack.stream(model, source(200), slots=4):
            assert result.adversarial.shape[0] == 1
        for sample in source(20):
            attack(model, sample.image[None], sample.labels[None])

    resident_bytes, objects = [], []
    for _ in range(6):
        round_of_attacks()
        resident_bytes.append(resident())
        objects.append(tensors())
    assert objects[1:] == objects[1:2] * 5
    # Of 220 images in each round, one tensor kept of each would be 9 MB a round.
    assert max(resident_bytes[4:]) - min(resident_bytes[1:4]) < 16 << 20, resident_bytes
