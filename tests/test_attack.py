from __future__ import annotations

import dataclasses
import itertools
import math
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import LABEL_DTYPES, generator, same_bits
from torch import Tensor, nn

from dagcore import DAG, Result, Status, reference
from dagcore.attacks.schedules import UntilFooled
from dagcore.ops import native
from dagcore.perturbation import value_range

NAN, INF = math.nan, math.inf
BACKENDS = pytest.mark.parametrize("backend", ["native", "reference"])
GAMMA = 12 / 255
SHAPE = (3, 3, 17, 19)  # images
TARGETS = (9, 10)  # score map of `ConvNet` for them
CLASSES = 6


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The networks here are so small that a second thread only ever waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class ConvNet(nn.Sequential):
    """A small segmentation network with everything whose mode matters."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            super().__init__(
                nn.Conv2d(3, 8, 3, padding=1),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.Dropout(0.5),
                nn.Conv2d(8, 8, 3, stride=2, padding=1),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.Conv2d(8, CLASSES, 1),
                nn.BatchNorm2d(CLASSES),
            )
            for module in self:
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 1.0
            # Running statistics of one batch: every class wins somewhere.
            with torch.no_grad():
                self(torch.rand(8, 3, 33, 33))
        self.to(dtype)


class Pixels(nn.Module):
    """scores = W (x - 1/2) at every pixel: no batch and no neighbours in its arithmetic."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        weight = torch.randn(num_classes, 3, generator=generator(3), dtype=torch.float64)
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Tensor:
        return torch.einsum("kc,nchw->nkhw", self.weight, images - 0.5)


def some_images(shape: tuple[int, ...] = SHAPE, seed: int = 0, **kwargs: Any) -> Tensor:
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64).to(**kwargs)


def predictions(model: nn.Module, images: Tensor) -> Tensor:
    """The clean argmax, with a band of ignored targets."""
    mode = model.training
    with torch.no_grad():
        labels = model.eval()(images).argmax(1)
    model.train(mode)
    labels[:, 2] = 255
    return labels


def some_labels(seed: int = 1, targets: tuple[int, ...] = TARGETS) -> Tensor:
    return torch.randint(0, CLASSES, (SHAPE[0], *targets), generator=generator(seed))


def assert_consistent(result: Result, images: Tensor, attack: DAG) -> None:
    """What holds for every result."""
    count = len(images)
    assert result.adversarial.shape == result.perturbation.shape == images.shape
    assert result.adversarial.dtype == images.dtype
    assert bool(result.adversarial.isfinite().all())
    assert not result.adversarial.requires_grad
    assert torch.equal(result.perturbation, result.adversarial - images)
    assert result.iterations.dtype == result.active.dtype == torch.int32
    assert result.iterations.shape == result.converged.shape == result.perceptibility.shape
    assert result.active.shape == (attack.max_iter + 1, count)
    assert result.converged.dtype == torch.bool
    assert isinstance(result.status, tuple)
    assert result.converged.tolist() == [s is Status.CONVERGED for s in result.status]
    for n, m in enumerate(result.iterations.tolist()):
        history = result.active[:, n].tolist()
        assert all(k >= 0 for k in history[: m + 1])  # each iterate was evaluated, the last too
        assert history[m + 1 :] == [-1] * (attack.max_iter - m)
        if result.status[n] is Status.BUDGET:
            assert m == attack.max_iter
            assert history[m] > 0
    if attack.bounds is not None and images.numel():
        assert float(result.adversarial.min()) >= attack.bounds[0]
        assert float(result.adversarial.max()) <= attack.bounds[1]
    if attack.epsilon is not None and images.numel():
        assert float(result.perturbation.abs().max()) <= attack.epsilon * (1 + 1e-5) + 1e-7
    p = result.perturbation.double().square().sum(1).flatten(1).mean(1).sqrt()
    scale = value_range(images, attack.bounds)
    torch.testing.assert_close(result.perceptibility.double(), p / scale, rtol=1e-5, atol=1e-9)


def assert_same_result(a: Result, b: Result) -> None:
    assert same_bits(a.adversarial, b.adversarial)
    assert torch.equal(a.active, b.active)
    assert torch.equal(a.iterations, b.iterations)
    assert a.status == b.status
    if isinstance(a.adversarial_labels, str):
        assert a.adversarial_labels == b.adversarial_labels
    else:
        assert torch.equal(a.adversarial_labels, b.adversarial_labels)


# --- native against the reference, bit for bit

SETTINGS = {
    "default": {},
    "no bounds": {"bounds": None},
    "ball": {"epsilon": 0.05},
    "tolerance": {"tolerance": 0.05},
    "budget": {"max_iter": 2},
    "ball without bounds": {"bounds": None, "epsilon": 0.02, "max_iter": 12},
    "ignored class": {"ignore_index": 2},
}
KINDS = ("permutation", "random", "runner-up", "given")


@pytest.mark.parametrize("labels_from", ["predictions", "random"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    ("goal", "kind"),
    [
        (g, k)
        for g, k in itertools.product(("leave", "reach"), KINDS)
        if (g, k) != ("reach", KINDS[2])
    ],
)
def test_native_loop_equals_reference_bit_for_bit(
    goal: str, kind: str, settings: str, labels_from: str
) -> None:
    model, images = ConvNet(), some_images(dtype=torch.float32)
    labels = predictions(model, images) if labels_from == "predictions" else some_labels()
    if settings == "ignored class":
        labels = labels.where(labels != 255, 2)
    adversarial = some_labels(5) if kind == "given" else kind
    results = []
    for backend in ("native", "reference"):
        given = {"gamma": GAMMA, "max_iter": 40, **SETTINGS[settings]}
        attack = DAG(goal=goal, backend=backend, **given)
        results.append(attack(model, images, labels, adversarial, generator(9)))
        assert_consistent(results[-1], images, attack)
    assert_same_result(*results)
    assert int(results[0].active[0].min()) > 0
    assert bool((results[0].iterations > 0).all())


def test_the_cases_above_stop_in_different_ways() -> None:
    model, images = ConvNet(), some_images(dtype=torch.float32)
    labels = predictions(model, images)
    left = DAG(gamma=GAMMA, max_iter=80)(model, images, labels, generator=generator(9))
    assert bool(left.converged.all())
    assert len(set(left.iterations.tolist())) > 1
    short = DAG(gamma=GAMMA, max_iter=2)(model, images, labels, generator=generator(9))
    assert short.status == (Status.BUDGET,) * 3


def test_loops_agree_on_the_device(device: torch.device) -> None:
    model = Pixels().to(device)
    images = some_images((4, 3, 6, 7), device=device)
    labels = predictions(model, images)
    results = [
        DAG(gamma=0.05, max_iter=60, backend=backend)(model, images, labels, "runner-up")
        for backend in ("native", "reference")
    ]
    assert_same_result(*results)
    assert bool(results[0].converged.all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(device: torch.device, dtype: torch.dtype) -> None:
    """Images in `dtype`; the network computes in float32, and gives its scores in `dtype`."""
    model = ConvNet().to(device)
    images = some_images().to(device, dtype)
    results = []
    for backend in ("native", "reference"):
        attack = DAG(gamma=4 / 255, max_iter=40, backend=backend)
        labels = predictions(model, images.float())
        result = attack(lambda x: model.eval()(x.float()).to(dtype), images, labels, "runner-up")
        assert_consistent(result, images, attack)
        results.append(result)
    assert_same_result(*results)
    assert bool((results[0].active[0] > 0).all())


@BACKENDS
def test_label_dtypes_make_no_difference(backend: str) -> None:
    model, images = ConvNet(), some_images(dtype=torch.float32)
    labels, adversarial = predictions(model, images), some_labels(5)
    attack = DAG(gamma=GAMMA, max_iter=20, backend=backend)
    expected = attack(model, images, labels, adversarial)
    drawn = attack(model, images, labels, "random", generator(4))
    for one, other in itertools.product(LABEL_DTYPES, LABEL_DTYPES):
        result = attack(model, images, labels.to(one), adversarial.to(other))
        assert torch.equal(result.adversarial, expected.adversarial)
        assert torch.equal(result.active, expected.active)
        again = attack(model, images, labels.to(one), "random", generator(4))
        assert torch.equal(again.adversarial, drawn.adversarial)


# --- against Algorithm 1 written out by hand


def by_hand(
    model: Callable[[Tensor], Tensor],
    clean: Tensor,  # (3, H, W)
    labels: Tensor,  # (*T)
    adversarial: Tensor | None,  # (*T), None: runner-up
    attack: DAG,
) -> tuple[Tensor, list[int], str]:
    """One image, one target after another: the iterate, |T_m| for each m, and why it stopped."""
    x, counts = clean.clone(), []
    positions = list(itertools.product(*map(range, labels.shape)))
    considered = [
        t
        for t in positions
        if int(labels[t]) != attack.ignore_index
        and not (
            attack.goal == "leave"
            and adversarial is not None
            and int(adversarial[t]) == int(labels[t])
        )
    ]
    while True:
        x.requires_grad_()
        scores = model(x[None])[0]
        objective, active = 0, 0
        for t in considered:
            f = scores[(slice(None), *t)]
            label, winner = int(labels[t]), int(f.argmax())
            if adversarial is None:
                order = f.argsort(descending=True).tolist()
                aim = next(c for c in order if c != label)
            else:
                aim = int(adversarial[t])
            if attack.goal == "leave" and winner == label:
                objective, active = objective + f[aim] - f[label], active + 1
            if attack.goal == "reach" and winner != aim:
                objective, active = objective + f[aim] - f[winner], active + 1
        counts.append(active)
        if active <= attack.tolerance * len(considered):
            return x.detach(), counts, "converged"
        if len(counts) > attack.max_iter:
            return x.detach(), counts, "budget"
        (r,) = torch.autograd.grad(objective, x)
        x = x.detach() + attack.gamma / r.abs().max() * r
        if attack.epsilon is not None:
            x = torch.minimum(torch.maximum(x, clean - attack.epsilon), clean + attack.epsilon)
        if attack.bounds is not None:
            x = x.clamp(*attack.bounds)


@BACKENDS
@pytest.mark.parametrize(
    "settings",
    [
        {"gamma": 0.01},
        {"gamma": 0.01, "bounds": None, "goal": "reach"},
        {"gamma": 0.05, "epsilon": 0.1, "max_iter": 15},
        {"gamma": 0.02, "tolerance": 0.25, "goal": "reach", "bounds": None},
        {"gamma": 0.03, "max_iter": 3},
        {"gamma": 0.02, "ignore_index": 1, "bounds": (-1.0, 2.0)},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["given", "runner-up"])
def test_equals_algorithm_written_by_hand(
    settings: dict[str, Any], kind: str, backend: str
) -> None:
    attack = DAG(backend=backend, **{"max_iter": 60, **settings})
    if kind == "runner-up" and attack.goal == "reach":
        kind = "permutation"
    model, images = Pixels(), some_images((3, 3, 4, 5))
    labels = predictions(model, images)
    labels[labels == 255] = attack.ignore_index
    given = torch.randint(0, 4, labels.shape, generator=generator(2)) if kind == "given" else kind
    result = attack(model, images, labels, given, generator(5))
    assert_consistent(result, images, attack)
    drawn = result.adversarial_labels
    for n in range(3):
        adversarial = None if isinstance(drawn, str) else drawn[n]
        x, counts, why = by_hand(model, images[n], labels[n], adversarial, attack)
        torch.testing.assert_close(result.adversarial[n], x, rtol=0, atol=1e-12)
        assert result.active[: len(counts), n].tolist() == counts
        assert int(result.iterations[n]) == len(counts) - 1
        assert str(result.status[n]) == why


def test_first_step_of_one_target_by_hand() -> None:
    # f = (x0, x1): the target leaves class 0 for class 1 along (-1, +1, 0).
    def model(x: Tensor) -> Tensor:
        return x[:, :2].clone()

    image = torch.tensor([0.75, 0.25, 0.5]).reshape(1, 3, 1, 1)
    labels = torch.zeros(1, 1, 1, dtype=torch.int64)
    attack = DAG(gamma=0.125, max_iter=5)
    result = attack(model, image, labels, torch.ones_like(labels))
    # After two steps the scores tie, and class 0 still wins; after three it has left.
    assert result.active[:, 0].tolist() == [1, 1, 1, 0, -1, -1]
    assert result.adversarial.flatten().tolist() == [0.375, 0.625, 0.5]
    assert result.perturbation.flatten().tolist() == [-0.375, 0.375, 0]
    assert float(result.perceptibility) == pytest.approx(0.375 * math.sqrt(2))
    assert result.iterations.tolist() == [3]


# --- how images stop


@BACKENDS
def test_budget_spent(backend: str) -> None:
    model, images = ConvNet(), some_images(dtype=torch.float32)
    labels = predictions(model, images)
    attack = DAG(gamma=1e-4, max_iter=3, backend=backend)
    result = attack(model, images, labels, "runner-up")
    assert_consistent(result, images, attack)
    assert result.status == (Status.BUDGET,) * 3
    assert result.iterations.tolist() == [3] * 3
    assert not torch.equal(result.adversarial, images)  # the attacked image, not the clean one
    assert bool((result.active > 0).all())
    last = attack.count_active(model, result.adversarial, labels, "runner-up")
    assert torch.equal(last, result.active[3])


@BACKENDS
def test_start_goes_on_where_another_attack_ended(backend: str) -> None:
    model, images = ConvNet(), some_images(dtype=torch.float32)
    labels = predictions(model, images)
    settings: dict[str, Any] = {"gamma": 1e-3, "epsilon": 4e-3, "backend": backend}
    whole = DAG(max_iter=7, **settings)(model, images, labels, "runner-up")
    first = DAG(max_iter=3, **settings)(model, images, labels, "runner-up")
    attack = DAG(max_iter=4, **settings)
    rest = attack(model, images, labels, "runner-up", start=first.adversarial)
    assert not torch.equal(first.adversarial, whole.adversarial)
    assert torch.equal(rest.adversarial, whole.adversarial)
    assert torch.equal(rest.perturbation, whole.perturbation)  # from the images, not the start
    assert torch.equal(rest.active, whole.active[3:])


@BACKENDS
def test_start_must_lie_in_the_ball(backend: str) -> None:
    attack = DAG(epsilon=4 / 255, max_iter=0, backend=backend)
    attack(ConvNet(), X, L, "runner-up", start=X + 4 / 255)
    with pytest.raises(ValueError, match=r"start must lie within epsilon=0.0156863 of images"):
        attack(ConvNet(), X, L, "runner-up", start=X + 5 / 255)


@BACKENDS
def test_max_iter_0(backend: str) -> None:
    model, images = ConvNet(), some_images(dtype=torch.float32)
    labels = predictions(model, images)
    labels[1] = 255
    attack = DAG(max_iter=0, backend=backend)
    result = attack(model, images, labels, "runner-up")
    assert_consistent(result, images, attack)
    assert result.status == (Status.BUDGET, Status.CONVERGED, Status.BUDGET)
    assert torch.equal(result.adversarial, images)
    assert result.active.shape == (1, 3)


@BACKENDS
def test_immediate_convergence(backend: str) -> None:
    model, images = ConvNet(), some_images(dtype=torch.float32)
    labels = predictions(model, images)
    wrong = torch.where(labels == 255, 255, (labels + 1) % CLASSES)
    attack = DAG(max_iter=5, backend=backend)
    result = attack(model, images, wrong, "runner-up")
    assert_consistent(result, images, attack)
    assert result.status == (Status.CONVERGED,) * 3
    assert result.iterations.tolist() == [0] * 3
    assert result.active[0].tolist() == [0] * 3
    assert torch.equal(result.adversarial, images)
    assert result.adversarial.data_ptr() != images.data_ptr()
    assert result.perceptibility.tolist() == [0] * 3


@BACKENDS
@pytest.mark.parametrize("kind", ["permutation", "random", "runner-up"])
def test_all_ignored(backend: str, kind: str) -> None:
    images = some_images(dtype=torch.float32)
    labels = torch.full((3, *TARGETS), 255, dtype=torch.uint8)
    attack = DAG(max_iter=5, backend=backend)
    result = attack(ConvNet(), images, labels, kind)
    assert_consistent(result, images, attack)
    assert bool(result.converged.all())
    assert torch.equal(result.adversarial, images)


@BACKENDS
@pytest.mark.parametrize("kind", ["permutation", "random", "runner-up"])
def test_empty_batch(backend: str, kind: str) -> None:
    images = torch.zeros(0, *SHAPE[1:])
    labels = torch.zeros(0, *TARGETS, dtype=torch.int64)
    attack = DAG(max_iter=5, backend=backend)
    result = attack(ConvNet(), images, labels, kind)
    assert_consistent(result, images, attack)
    assert result.status == ()
    assert repr(result) == "Result()"


@BACKENDS
def test_tolerance_is_a_fraction_of_the_targets_that_count(backend: str) -> None:
    model, images = Pixels(), some_images((2, 3, 4, 5))
    labels = torch.zeros(2, 4, 5, dtype=torch.int64)  # 20 targets
    labels[:, 0] = 255  # 15
    adversarial = torch.ones_like(labels)
    adversarial[:, 1] = 0  # 10 of which can be active

    def active_share(x: Tensor) -> Tensor:
        """Four targets of image 0 and five of image 1 hold, whatever x."""
        scores = model(x) * 0
        scores[:, 2] += 1
        scores[0, 0, 2, :4] += 2
        scores[1, 0, 3, :5] += 2
        return scores

    for tolerance, expected in ((0.39, [False, False]), (0.4, [True, False]), (0.5, [True, True])):
        attack = DAG(max_iter=1, tolerance=tolerance, backend=backend)
        result = attack(active_share, images, labels, adversarial)
        assert result.active[0].tolist() == [4, 5]
        assert result.converged.tolist() == expected


@BACKENDS
@pytest.mark.parametrize(("active", "of"), [(13, 22), (7, 23), (15, 29), (3, 37), (1, 3)])
def test_tolerance_is_exact(backend: str, active: int, of: int) -> None:
    """At most this fraction: k of n targets meet a tolerance of k / n."""

    def model(x: Tensor) -> Tensor:
        scores = torch.zeros(1, 2, of)
        scores[0, 0, :active] = 1
        scores[0, 1, active:] = 1
        return scores + 0 * x.sum()

    attack = DAG(max_iter=1, tolerance=active / of, backend=backend)
    labels = torch.zeros(1, of, dtype=torch.int64)
    result = attack(model, torch.zeros(1, 3, 2, 2), labels, torch.ones_like(labels))
    assert result.active[0].tolist() == [active]
    assert result.converged.tolist() == [True]


@BACKENDS
def test_tolerance_leaves_that_many_targets(backend: str) -> None:
    model, images = ConvNet(), some_images(dtype=torch.float32)
    labels = predictions(model, images)
    attack = DAG(gamma=GAMMA, max_iter=80, tolerance=0.3, backend=backend)
    result = attack(model, images, labels, "runner-up")
    exact = dataclasses.replace(attack, tolerance=0.0)(model, images, labels, "runner-up")
    allowed = 0.3 * (labels[0] != 255).sum()
    assert bool(result.converged.all())
    for n, m in enumerate(result.iterations.tolist()):
        assert int(result.active[m, n]) <= allowed < int(result.active[m - 1, n])
        assert m < int(exact.iterations[n])
        # Up to there, it is the same attack.
        assert torch.equal(result.active[: m + 1, n], exact.active[: m + 1, n])


class Breaking(nn.Module):
    """`Pixels` whose gradient of images 0 and 2 is spoiled from the `after`th forward pass on."""

    def __init__(self, factor: float, after: int) -> None:
        super().__init__()
        self.pixels, self.factor, self.after, self.calls = Pixels(), factor, after, 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        scores = self.pixels(images)
        if self.calls > self.after:
            factor, spoiled = self.factor, torch.tensor([0, 2])

            def spoil(gradient: Tensor) -> Tensor:
                if len(gradient) < 3:  # image 1 goes on alone
                    return gradient
                gradient = gradient.clone()
                gradient[spoiled] = gradient[spoiled] * factor
                return gradient

            scores.register_hook(spoil)
        return scores


@BACKENDS
@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("factor", [0.0, NAN, INF, -INF])
def test_stalled(backend: str, factor: float, after: int) -> None:
    images = some_images((3, 3, 4, 5))
    labels = predictions(Pixels(), images)
    attack = DAG(gamma=0.05, max_iter=100, backend=backend)
    result = attack(Breaking(factor, after), images, labels, "runner-up")
    assert_consistent(result, images, attack)
    assert result.status == (Status.STALLED, Status.CONVERGED, Status.STALLED)
    assert result.iterations[[0, 2]].tolist() == [after, after]
    # The last good iterate, and an attack of image 1 that takes no notice.
    until_then = dataclasses.replace(attack, max_iter=after)
    good = until_then(Pixels(), images, labels, "runner-up")
    assert torch.equal(result.adversarial[[0, 2]], good.adversarial[[0, 2]])
    assert torch.equal(result.active[: after + 1, [0, 2]], good.active[:, [0, 2]])
    alone = attack(Pixels(), images, labels, "runner-up")
    assert torch.equal(result.adversarial[1], alone.adversarial[1])
    assert torch.equal(result.active[:, 1], alone.active[:, 1])


@BACKENDS
def test_constant_network_stalls(backend: str) -> None:
    images = some_images((2, 3, 4, 5), dtype=torch.float32)
    labels = torch.zeros(2, 4, 5, dtype=torch.int64)

    def constant(x: Tensor) -> Tensor:
        return torch.zeros(len(x), 3, 4, 5) + 0 * x.sum()

    attack = DAG(max_iter=4, backend=backend)
    result = attack(constant, images, labels, "runner-up")
    assert_consistent(result, images, attack)
    assert result.status == (Status.STALLED,) * 2
    assert result.iterations.tolist() == [0, 0]
    assert result.active[0].tolist() == [20, 20]
    assert torch.equal(result.adversarial, images)


@BACKENDS
@pytest.mark.parametrize("kind", ["permutation", "runner-up", "reached"])
@pytest.mark.parametrize("max_iter", [0, 5])
def test_nan_scores_are_no_success(backend: str, kind: str, max_iter: int) -> None:
    images = some_images((2, 3, 4, 5))
    labels = predictions(Pixels(), images)

    def broken(x: Tensor) -> Tensor:
        scores = Pixels()(x)
        return torch.where(torch.arange(len(x))[:, None, None, None] == 0, scores, scores * NAN)

    goal = "reach" if kind == "reached" else "leave"
    adversarial = torch.zeros_like(labels) if kind == "reached" else kind  # NaN wins as class 0
    attack = DAG(gamma=0.005, max_iter=max_iter, goal=goal, backend=backend)
    result = attack(broken, images, labels, adversarial)
    assert_consistent(result, images, attack)
    assert result.status[1] is (Status.STALLED if max_iter else Status.BUDGET)
    assert int(result.active[0, 1]) == 15
    assert torch.equal(result.adversarial[1], images[1])


# --- an image in a batch, and the image alone


@BACKENDS
@pytest.mark.parametrize("goal", ["leave", "reach"])
def test_image_in_a_batch_equals_the_image_alone(backend: str, goal: str) -> None:
    model, images = ConvNet(torch.float64), some_images()
    labels, adversarial = predictions(model, images), some_labels(5)
    attack = DAG(gamma=GAMMA, max_iter=80, goal=goal, tolerance=0.25, backend=backend)
    together = attack(model, images, labels, adversarial)
    assert len(set(together.iterations.tolist())) > 1
    for n in range(3):
        one = slice(n, n + 1)
        alone = attack(model, images[one], labels[one], adversarial[one])
        assert torch.equal(alone.active[:, 0], together.active[:, n])
        assert alone.status[0] == together.status[n]
        torch.testing.assert_close(alone.adversarial[0], together.adversarial[n], rtol=0, atol=1e-9)


# --- what is left as it was


@BACKENDS
def test_images_and_labels_are_left_alone(backend: str) -> None:
    model, images = ConvNet(), some_images(dtype=torch.float32)
    labels, adversarial = predictions(model, images), some_labels(5)
    before = [t.clone() for t in (images, labels, adversarial)]
    DAG(gamma=GAMMA, max_iter=5, backend=backend)(model, images, labels, adversarial)
    for t, was in zip((images, labels, adversarial), before, strict=True):
        assert torch.equal(t, was)
    assert not images.requires_grad
    assert images.grad is None


@BACKENDS
def test_images_that_require_grad_and_other_layouts(backend: str) -> None:
    model, images = ConvNet(), some_images(dtype=torch.float32)
    labels = predictions(model, images)
    attack = DAG(gamma=GAMMA, max_iter=5, backend=backend)
    expected = attack(model, images, labels, "runner-up")
    leaf = images.clone().requires_grad_()
    assert_same_result(attack(model, leaf, labels, "runner-up"), expected)
    assert leaf.grad is None
    padded = torch.zeros(3, 3, 20, 20)[:, :, 1:18, :19].copy_(images)
    assert_same_result(attack(model, padded, labels, "runner-up"), expected)


def mode_of(model: nn.Module) -> list[tuple[str, bool]]:
    return [(name, module.training) for name, module in model.named_modules()] + [
        (name, parameter.requires_grad) for name, parameter in model.named_parameters()
    ]


def mixed_model() -> ConvNet:
    model = ConvNet()
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[7].bias.requires_grad_(False)
    return model


@BACKENDS
def test_model_is_put_back(backend: str) -> None:
    model, images = mixed_model(), some_images(dtype=torch.float32)
    labels = predictions(ConvNet(), images)
    before = mode_of(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    attack = DAG(gamma=GAMMA, max_iter=3, backend=backend)
    result = attack(model, images, labels, "runner-up")
    attack.count_active(model, images, labels, "runner-up")
    assert mode_of(model) == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    # It was attacked in eval mode: no dropout, no batch statistics.
    assert_same_result(result, attack(ConvNet().eval(), images, labels, "runner-up"))


@BACKENDS
@pytest.mark.parametrize("failing_call", [1, 3])
def test_model_is_put_back_after_an_exception(backend: str, failing_call: int) -> None:
    model, images = mixed_model(), some_images(dtype=torch.float32)
    labels = predictions(ConvNet(), images)
    before, calls = mode_of(model), []

    def fail(*_: object) -> None:
        calls.append(model.training)
        if len(calls) == failing_call:
            raise ZeroDivisionError("the network's own")

    model[4].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError, match="the network's own"):
        DAG(gamma=GAMMA, max_iter=9, backend=backend)(model, images, labels, "runner-up")
    assert calls == [False] * failing_call
    assert mode_of(model) == before


def test_parameters_get_no_gradient_during_the_attack() -> None:
    model, images, seen = ConvNet(), some_images(dtype=torch.float32), []
    labels = predictions(model, images)
    model[0].register_forward_hook(
        lambda module, *_: seen.append(any(p.requires_grad for p in model.parameters()))
    )
    DAG(gamma=GAMMA, max_iter=2)(model, images, labels, "runner-up")
    assert seen == [False] * 3


@BACKENDS
def test_under_no_grad(backend: str) -> None:
    model, images = ConvNet(), some_images(dtype=torch.float32)
    labels = predictions(model, images)
    attack = DAG(gamma=GAMMA, max_iter=3, backend=backend)
    expected = attack(model, images, labels, "runner-up")
    with torch.no_grad():
        assert_same_result(attack(model, images, labels, "runner-up"), expected)
        assert not torch.is_grad_enabled()


# --- what a model may return


@BACKENDS
@pytest.mark.parametrize("wrap", ["out", "logits", "both", "tensor"])
def test_outputs_understood(backend: str, wrap: str) -> None:
    model, images = ConvNet().eval(), some_images(dtype=torch.float32)
    labels = predictions(model, images)
    wrappers: dict[str, Callable[[Tensor], Any]] = {
        "tensor": lambda s: s,
        "out": lambda s: {"aux": s * 0, "out": s},
        "logits": lambda s: SimpleNamespace(logits=s, loss=None),
        "both": lambda s: type("Output", (dict,), {"logits": s})(loss=0),
    }
    attack = DAG(gamma=GAMMA, max_iter=3, backend=backend)
    expected = attack(model, images, labels, "runner-up")
    result = attack(lambda x: wrappers[wrap](model(x)), images, labels, "runner-up")
    assert_same_result(result, expected)


@BACKENDS
@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (
            lambda s: (s, s),
            TypeError,
            r"model must return scores as a tensor.*got tuple of 2: \(3, 6",
        ),
        (lambda s: None, TypeError, "model must return scores.*got NoneType"),
        (lambda s: {"scores": s}, TypeError, "model must return scores.*got dict"),
        (lambda s: {"out": None}, TypeError, "model must return scores"),
        (lambda s: s[:2], ValueError, r"model must return scores of shape \(3, C, \*targets\)"),
        (lambda s: s[:, 0, 0, 0], ValueError, r"model must return.*got \(3,\)"),
        (
            lambda s: torch.cat([s, s], 3),
            ValueError,
            r"labels must have shape \(3, 9, 20\) to match the model's scores \(3, 6, 9, 20\), "
            r"or be larger maps, got \(3, 9, 10\)",
        ),
        (lambda s: s.detach().round().long(), TypeError, "scores must be float16.*got int64"),
        (lambda s: s[:, :0], ValueError, "model must return scores of at least 2 classes"),
        (lambda s: s[:, :1], ValueError, r"at least 2 classes, got.*victims.binary"),
        (lambda s: s[:, :3], ValueError, r"labels must lie in \[0, 3\)"),
    ],
)
def test_outputs_refused(
    backend: str, output: Callable[[Tensor], Any], error: type[Exception], message: str
) -> None:
    model, images = ConvNet().eval(), some_images(dtype=torch.float32)
    labels = predictions(model, images)
    with pytest.raises(error, match=message):
        DAG(max_iter=3, backend=backend)(lambda x: output(model(x)), images, labels, "runner-up")


@BACKENDS
@pytest.mark.parametrize("cut", ["detach", "other input"])
def test_scores_without_a_gradient_are_refused(backend: str, cut: str) -> None:
    model, images = Pixels(), some_images((2, 3, 4, 5))
    labels = predictions(model, images)
    other = images.clone().requires_grad_()

    def cut_off(x: Tensor) -> Tensor:
        return model(x).detach() if cut == "detach" else model(other)

    with pytest.raises(ValueError, match="model must compute its scores from the images"):
        DAG(max_iter=3, backend=backend)(cut_off, images, labels, "runner-up")


@BACKENDS
@pytest.mark.parametrize("targets", [(), (5,), (2, 3, 2)])
def test_any_number_of_target_dimensions(backend: str, targets: tuple[int, ...]) -> None:
    count = math.prod(targets)
    weight = torch.randn(48, 4 * count, generator=generator(0), dtype=torch.float64)

    def model(x: Tensor) -> Tensor:
        return ((x - 0.5).flatten(1) @ weight).reshape(len(x), 4, *targets)

    images = some_images((2, 3, 4, 4))
    labels = model(images).argmax(1)
    attack = DAG(gamma=0.02, max_iter=200, bounds=None, backend=backend)
    result = attack(model, images, labels, generator=generator(0))
    assert_consistent(result, images, attack)
    assert bool(result.converged.all())
    assert not bool((model(result.adversarial).argmax(1) == labels).any())


# --- memory of the process


KEEPING = """
import resource
import torch
from dagcore import DAG, freed_memory_kept

def page_faults(allocations):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(allocations):
        torch.ones(16 << 20)  # 64 MiB: glibc maps that anew each time
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

usual = page_faults(16)
with freed_memory_kept():
    page_faults(4)
    with freed_memory_kept():
        pass
    kept = page_faults(16)  # still kept: the inner block was not the last
    held = resident()
assert kept < usual / 4, (kept, usual)
assert resident() < held - (32 << 20), (resident(), held)  # given back
during = []

def model(images):
    during.append(page_faults(4))
    return images[:, :2] + torch.tensor([1.0, 0.0]).reshape(2, 1, 1)

labels = torch.zeros(1, 2, 2, dtype=torch.int64)
DAG(max_iter=4)(model, torch.full((1, 3, 2, 2), 0.5), labels, "runner-up")
assert len(during) == 5
assert min(during) < usual / 16, (during, usual)
"""


@pytest.mark.skipif(
    native.module is None or platform.libc_ver()[0] != "glibc", reason="needs glibc"
)
def test_freed_memory_is_kept_during_an_attack_and_given_back_after_it() -> None:
    # In a process of its own: what its heap holds decides where the next tensor goes.
    done = subprocess.run(
        [sys.executable, "-c", KEEPING],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr


# --- wrong arguments of the call

X, L = torch.full(SHAPE, 0.5), torch.zeros(3, *TARGETS, dtype=torch.int64)
WRONG_CALLS = {
    "images type": ({"images": None}, TypeError, "images must be a torch.Tensor, got NoneType"),
    "images dtype": (
        {"images": torch.zeros(SHAPE, dtype=torch.uint8)},
        TypeError,
        "images must be float16, bfloat16, float32 or float64, got uint8",
    ),
    "images dims": ({"images": X[0, 0, 0]}, ValueError, r"images must have shape \(N, 3, H, W\)"),
    "images above": (
        {"images": X + 0.6},
        ValueError,
        r"images must lie within bounds \(0.0, 1.0\), got values in \[1.10000002, 1.10000002\]",
    ),
    "images below": ({"images": X - 0.6}, ValueError, "images must lie within bounds"),
    "images NaN": ({"images": X * NAN}, ValueError, "images must be finite, got a NaN"),
    "images infinite": ({"images": X * INF}, ValueError, "images must be finite"),
    "labels type": ({"labels": [0]}, TypeError, "labels must be a torch.Tensor, got list"),
    "labels dtype": (
        {"labels": L.float()},
        TypeError,
        "labels must be uint8, int32 or int64, got float32",
    ),
    "labels batch": (
        {"labels": L[:2]},
        ValueError,
        r"labels must have one map for each of 3 images, got shape \(2, 9, 10\)",
    ),
    "labels scalar": ({"labels": L[0, 0, 0]}, ValueError, "labels must have one map for each"),
    "labels shape": (
        {"labels": L[:, 1:]},
        ValueError,
        r"labels must have shape \(3, 9, 10\) to match the model's scores \(3, 6, 9, 10\), "
        r"or be larger maps, got \(3, 8, 10\)",
    ),
    "labels range": (
        {"labels": L + CLASSES},
        ValueError,
        r"labels must lie in \[0, 6\) or equal ignore_index=255, got 6 at \(0, 0, 0\)",
    ),
    "labels negative": ({"labels": L - 1}, ValueError, "labels must lie in .* got -1"),
    "labels device": ({"labels": L.to("meta")}, ValueError, "labels must be on the device of"),
    "adversarial shape": (
        {"adversarial_labels": L[..., 1:]},
        ValueError,
        r"adversarial_labels must have shape \(3, 9, 10\) to match labels, got \(3, 9, 9\)",
    ),
    "adversarial dtype": (
        {"adversarial_labels": L.float()},
        TypeError,
        "adversarial_labels must be uint8, int32 or int64, got float32",
    ),
    "adversarial range": (
        {"adversarial_labels": L + CLASSES},
        ValueError,
        r"adversarial_labels must lie in \[0, 6\).* got 6",
    ),
    "adversarial device": (
        {"adversarial_labels": L.to("meta")},
        ValueError,
        "adversarial_labels must be on the device of images",
    ),
    "adversarial kind": (
        {"adversarial_labels": "strongest"},
        ValueError,
        "adversarial_labels must be 'permutation', 'random' or 'runner-up', got 'strongest'",
    ),
    "adversarial type": (
        {"adversarial_labels": 3},
        TypeError,
        "adversarial_labels must be a torch.Tensor, a string or None, got int",
    ),
    "generator": (
        {"generator": 0},
        TypeError,
        "generator must be a torch.Generator, got int",
    ),
    "start type": ({"start": 0}, TypeError, "start must be a torch.Tensor, got int"),
    "start dtype": ({"start": X.double()}, TypeError, "start must be float32, got float64"),
    "start shape": (
        {"start": X[1:]},
        ValueError,
        r"start must have shape \(3, 3, 17, 19\) to match images, got \(2, 3, 17, 19\)",
    ),
    "start outside": ({"start": X + 0.6}, ValueError, r"start must lie within bounds"),
}


@BACKENDS
@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_call(backend: str, name: str) -> None:
    changed, error, message = WRONG_CALLS[name]
    given = {"images": X, "labels": L, "adversarial_labels": "runner-up", **changed}
    with pytest.raises(error, match=f"^{message}"):
        DAG(max_iter=2, backend=backend)(ConvNet(), **given)


@BACKENDS
def test_runner_up_is_nothing_to_reach(backend: str) -> None:
    with pytest.raises(ValueError, match="must be a tensor, 'permutation' or 'random' for goal"):
        DAG(goal="reach", backend=backend)(ConvNet(), X, L, "runner-up")


def test_model_that_cannot_be_called() -> None:
    with pytest.raises(TypeError):
        DAG()("resnet", X, L)


def test_gamma_below_the_spacing_of_16_bit_images() -> None:
    with pytest.raises(ValueError, match=r"gamma must be at least the spacing of bfloat16 images"):
        DAG()(ConvNet(torch.bfloat16), torch.ones(SHAPE, dtype=torch.bfloat16), L)


def test_images_at_bounds_that_float32_rounds() -> None:
    """float32(0.3) is above the Python number 0.3: an attack's own result can be attacked again."""
    model, images = ConvNet(), some_images(dtype=torch.float32).clamp(0, 0.3)
    labels = predictions(model, images)
    attack = DAG(gamma=GAMMA, max_iter=2, bounds=(0.0, 0.3))
    result = attack(model, images, labels, "runner-up")
    again = attack(model, result.adversarial, labels, "runner-up")
    assert float(again.adversarial.max()) <= float(torch.tensor(0.3))


def test_images_outside_0_to_1_without_bounds() -> None:
    model, images = ConvNet(), 255 * some_images(dtype=torch.float32)
    labels = predictions(model, images)
    attack = DAG(gamma=0.5, bounds=None, max_iter=3)
    result = attack(model, images, labels, "runner-up")
    assert_consistent(result, images, attack)
    assert bool((result.iterations > 0).all())
    scaled = DAG(gamma=0.5 / 255, bounds=None, max_iter=3)(
        lambda x: model.eval()(255 * x), images / 255, labels, "runner-up"
    )
    torch.testing.assert_close(result.perceptibility, scaled.perceptibility, rtol=1e-3, atol=0)


# --- settings

WRONG_SETTINGS = [
    ("gamma", 0, ValueError),
    ("gamma", -0.1, ValueError),
    ("gamma", NAN, ValueError),
    ("gamma", INF, ValueError),
    ("gamma", "0.1", TypeError),
    ("gamma", None, TypeError),
    ("gamma", True, TypeError),
    ("max_iter", -1, ValueError),
    ("max_iter", 1.5, TypeError),
    ("max_iter", True, TypeError),
    ("max_iter", None, TypeError),
    ("goal", "flee", ValueError),
    ("goal", None, ValueError),
    ("bounds", (1.0, 0.0), ValueError),
    ("bounds", (0.5, 0.5), ValueError),
    ("bounds", (0.0,), ValueError),
    ("bounds", (0.0, 1.0, 2.0), ValueError),
    ("bounds", 1.0, ValueError),
    ("bounds", "01", ValueError),
    ("bounds", (0.0, "1"), TypeError),
    ("bounds", (NAN, 1.0), ValueError),
    ("bounds", (0.0, INF), ValueError),
    ("epsilon", 0.0, ValueError),
    ("epsilon", -1, ValueError),
    ("epsilon", NAN, ValueError),
    ("epsilon", "8/255", TypeError),
    ("tolerance", -0.01, ValueError),
    ("tolerance", 1.0, ValueError),
    ("tolerance", NAN, ValueError),
    ("tolerance", None, TypeError),
    ("ignore_index", 1.0, TypeError),
    ("ignore_index", None, TypeError),
    ("backend", "cuda", ValueError),
    ("backend", None, ValueError),
]


@pytest.mark.parametrize(("name", "value", "error"), WRONG_SETTINGS)
def test_wrong_settings(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{name}.* must be .*got "):
        DAG(**{name: value})


def test_settings_are_keyword_only_and_frozen() -> None:
    with pytest.raises(TypeError, match="positional"):
        DAG(0.1)
    attack = DAG()
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.gamma = 1.0
    assert attack == DAG(gamma=0.5 / 255, max_iter=200, goal="leave", bounds=(0.0, 1.0))
    assert (attack.epsilon, attack.tolerance, attack.ignore_index) == (None, 0.0, 255)
    assert "gamma=0.00196" in repr(attack)


# --- the result, callbacks, counts


def test_result_is_frozen_and_readable() -> None:
    model, images = ConvNet(), some_images(dtype=torch.float32)
    labels = predictions(model, images)
    labels[1] = 255
    result = DAG(gamma=GAMMA, max_iter=2)(model, images, labels, "runner-up")
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.status = ()
    text = repr(result)
    assert text.startswith("Result(budget after 2 updates (p=")
    assert "converged after 0 updates (p=0.00e+00)" in text
    assert [str(s) for s in result.status] == ["budget", "converged", "budget"]
    assert result.status[0] == "budget"


def test_callback_gets_the_counts(device: torch.device) -> None:
    model = Pixels().to(device)
    images = some_images((3, 3, 4, 5), device=device)
    labels, seen = predictions(model, images), []
    attack = DAG(gamma=0.05, max_iter=60)
    result = attack(
        model,
        images,
        labels,
        "runner-up",
        callback=lambda m, counts: seen.append((m, counts.tolist())),
    )
    assert bool(result.converged.all())
    longest = int(result.iterations.max())
    assert longest > int(result.iterations.min()) > 0
    assert [m for m, _ in seen] == list(range(longest + 1))
    assert [counts for _, counts in seen] == result.active[: longest + 1].tolist()


def test_callback_may_stop_the_attack() -> None:
    model, images = mixed_model(), some_images(dtype=torch.float32)
    before = mode_of(model)

    def stop(m: int, counts: Tensor) -> None:
        if m == 2:
            raise KeyboardInterrupt

    labels = predictions(ConvNet(), images)
    with pytest.raises(KeyboardInterrupt):
        DAG(gamma=1e-4)(model, images, labels, "runner-up", callback=stop)
    assert mode_of(model) == before


@BACKENDS
@pytest.mark.parametrize("goal", ["leave", "reach"])
def test_count_active(backend: str, goal: str) -> None:
    model, images = ConvNet(), some_images(dtype=torch.float32)
    labels = predictions(model, images)
    attack = DAG(gamma=GAMMA, max_iter=4, goal=goal, backend=backend)
    result = attack(model, images, labels, generator=generator(0))
    drawn = result.adversarial_labels
    assert torch.equal(attack.count_active(model, images, labels, drawn), result.active[0])
    m = int(result.iterations.max())
    last = attack.count_active(model, result.adversarial, labels, drawn)
    assert last.tolist() == [int(result.active[int(k), n]) for n, k in enumerate(result.iterations)]
    assert m == 4
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 6\)"):
        attack.count_active(model, images, labels + 6, drawn)
    with pytest.raises(ValueError, match="adversarial_labels must be"):
        attack.count_active(model, images, labels, None)


# --- randomness


@BACKENDS
@pytest.mark.parametrize("kind", ["permutation", "random", None])
def test_generator_makes_it_reproducible(backend: str, kind: str | None) -> None:
    model, images = ConvNet(), some_images(dtype=torch.float32)
    labels = predictions(model, images)
    attack = DAG(gamma=GAMMA, max_iter=4, backend=backend)
    state = torch.random.get_rng_state()
    first, again, other = (
        attack(model, images, labels, kind, generator(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert_same_result(first, again)
    assert not torch.equal(first.adversarial_labels, other.adversarial_labels)
    counted = labels != 255
    assert not bool((first.adversarial_labels == labels)[counted].any())
    assert bool((first.adversarial_labels == 255)[~counted].all())


@BACKENDS
def test_default_is_another_permutation_for_each_image(backend: str) -> None:
    labels = torch.arange(40).repeat(4, 1)

    def model(x: Tensor) -> Tensor:
        eye = torch.eye(40)[None] + 0 * x.sum()
        return eye.expand(4, 40, 40)

    attack = DAG(max_iter=0, backend=backend)
    result = attack(model, torch.zeros(4, 3, 2, 2), labels, generator=generator(0))
    drawn = result.adversarial_labels
    for permuted in drawn:
        assert torch.equal(permuted.sort().values, torch.arange(40))
    assert len({tuple(permuted.tolist()) for permuted in drawn}) == 4


@BACKENDS
def test_ignore_index_that_a_uint8_label_cannot_hold(backend: str) -> None:
    """255 is a class of its own where ignore_index is -1."""
    weight = torch.randn(256, 12, generator=generator(0))

    def model(x: Tensor) -> Tensor:
        bias = torch.zeros(256)
        bias[255] = 20
        return x.flatten(1) @ weight.T + bias

    labels = torch.tensor([255], dtype=torch.uint8)
    attack = DAG(max_iter=0, ignore_index=-1, backend=backend)
    result = attack(model, torch.zeros(1, 3, 2, 2), labels, generator=generator(0))
    assert result.active[0].tolist() == [1]
    assert result.adversarial_labels.tolist() != [255]


def test_trace_of_the_reference_has_the_documented_types() -> None:
    model, images = ConvNet().eval(), some_images(dtype=torch.float32)
    trace = reference.dag(model, images, predictions(model, images), "runner-up", max_iter=2)
    assert trace.images.shape == images.shape
    assert trace.iterations.dtype == torch.int32
    assert trace.status == ["budget"] * 3
    assert trace.active.shape == (3, 3)
    assert trace.adversarial_labels == "runner-up"


@pytest.mark.parametrize("tolerance", [0.0, 0.06 - 0.01, 0.1 * 3, 0.29, 1 / 3, 0.7 * 0.1])
def test_the_allowance_is_the_largest_count_within_the_tolerance(tolerance: float) -> None:
    targets = torch.arange(3000)
    allowed = UntilFooled(1, tolerance).allowed(targets)
    for count, most in zip(targets.tolist(), allowed.tolist(), strict=True):
        assert most / max(1, count) <= tolerance < (most + 1) / max(1, count)
