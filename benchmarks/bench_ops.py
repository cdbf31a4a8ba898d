"""Each op: native beside the reference and beside the floor, one copy of what must be moved.

    python -m pytest benchmarks/bench_ops.py [--device cuda] [--save ops-cpu]

The floor of dag_seed and loss_seed is `clone` of the scores (read once, write once); that of
linf_step_, pgd_step_ and linf_prox_ is `clone` of the images. loss_seed stands beside the same loss
by autograd, in the fastest PyTorch, loss_seed_bilinear beside that and interpolate, pgd_step_
beside the same step for the whole batch in PyTorch. What a margin or levels cost is timed against
the native side alone, in rows of their own. Ratios above 1 mean that the other side is slower than
the native one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bench_real import DEEPLABS, REAL, load_network, photograph
from common import alternate, seconds
from conftest import Rows
from pytest_benchmark.fixture import BenchmarkFixture

import dagcore

SHAPES = [(1, 21, 512, 512), (4, 21, 512, 512), (1, 150, 512, 512), (8, 19, 256, 512)]
DTYPES = [torch.float32, torch.bfloat16]


def compare(
    benchmark: BenchmarkFixture,
    rows: Rows,
    op: str,
    case: str,
    native: Callable[[], object],
    others: dict[str, Callable[[], object]],
    rounds: int = 15,
) -> None:
    """Benchmark the native side, the others once before each of its rounds."""
    times: dict[str, list[float]] = {"native": [], **{name: [] for name in others}}

    def in_turn() -> None:
        for name, run in others.items():
            times[name].append(seconds(run, rows.device))

    def timed() -> None:
        times["native"].append(seconds(native, rows.device))

    benchmark.group = f"{op} {case}"
    benchmark.pedantic(timed, setup=in_turn, rounds=rounds, warmup_rounds=2)
    rows.add(op, case, {name: values[-rounds:] for name, values in times.items()})


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", ["class first", "class last"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_dag_seed(
    benchmark: BenchmarkFixture,
    rows: Rows,
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
) -> None:
    """Random scores, four targets in five still correct, labels as uint8."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(shape, generator=generator).to(dtype)
    right = torch.rand(shape[:1] + shape[2:], generator=generator) < 0.8
    labels = torch.where(right, scores.argmax(1), 0).to(torch.uint8).to(rows.device)
    adversarial = (labels + 1) % shape[1]
    scores = scores.to(rows.device)
    if layout == "class last":
        scores = scores.to(memory_format=torch.channels_last)
    compare(
        benchmark,
        rows,
        "dag_seed",
        f"{'x'.join(map(str, shape))} {name_of(dtype)} {layout}",
        lambda: dagcore.ops.dag_seed(scores, labels, adversarial),
        {
            "reference": lambda: dagcore.reference.dag_seed(scores, labels, adversarial),
            "floor": lambda: scores.clone(),
        },
    )
    sides: dict[str, Callable[[], object]] = {
        "native": lambda: dagcore.ops.dag_seed(scores, labels, adversarial),
        "with a margin": lambda: dagcore.ops.dag_seed(scores, labels, adversarial, margin=1.0),
    }
    case = f"{'x'.join(map(str, shape))} {name_of(dtype)} {layout}, alone"
    rows.add("dag_seed", case, alternate(sides, 31, device=rows.device))


LOSSES = ("cross-entropy", "jensen-shannon", "cosine", "dlr")


def by_autograd(
    loss: str, scores: torch.Tensor, labels: torch.Tensor, align_corners: bool | None = None
) -> torch.Tensor:
    """The seed of a loss by the fastest PyTorch: torch's fused cross-entropy and topk.

    With align_corners, through interpolate.
    """
    functional = torch.nn.functional
    leaf = scores = scores.detach().requires_grad_()
    if align_corners is not None:
        scores = functional.interpolate(
            leaf, labels.shape[1:], mode="bilinear", align_corners=align_corners
        )
    if loss == "dlr":
        top, at = scores.topk(3, dim=1)
        rival = torch.where(at[:, 0] == labels, top[:, 1], top[:, 0])
        own = scores.gather(1, labels.unsqueeze(1)).squeeze(1)
        total = (-(own - rival) / (top[:, 0] - top[:, 2] + 1e-12)).sum()
    else:
        entropy = functional.cross_entropy(scores, labels, reduction="none")
        if loss == "cross-entropy":
            total = entropy.sum()
        elif loss == "jensen-shannon":
            p = (-entropy).exp()
            total = ((-p * entropy - (1 + p) * p.log1p()) / 2).sum()
        else:
            assert loss == "cosine"
            p = scores.detach().softmax(1)
            weight = (-entropy.detach()).exp() / torch.linalg.vector_norm(p, dim=1)
            total = (weight * entropy).sum()
    (seed,) = torch.autograd.grad(total, leaf)
    return seed


@pytest.mark.parametrize("layout", ["class first", "class last"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES[:3:2], ids=lambda s: "x".join(map(str, s)))
def test_loss_seed(
    benchmark: BenchmarkFixture, rows: Rows, shape: tuple[int, ...], loss: str, layout: str
) -> None:
    """Random scores, four targets in five right; the floor is `clone` of the scores."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(shape, generator=generator)
    right = torch.rand(shape[:1] + shape[2:], generator=generator) < 0.8
    labels = torch.where(right, scores.argmax(1), 0).to(rows.device)
    scores = scores.to(rows.device)
    if layout == "class last":
        scores = scores.to(memory_format=torch.channels_last)
    compare(
        benchmark,
        rows,
        "loss_seed",
        f"{loss} {'x'.join(map(str, shape))} {layout}",
        lambda: dagcore.ops.loss_seed(scores, labels, loss=loss),
        {
            "autograd": lambda: by_autograd(loss, scores, labels),
            "floor": lambda: scores.clone(),
        },
        rounds=9,
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("shape", "size"), [((1, 21, 64, 64), 512), ((1, 150, 128, 128), 512)], ids=str
)
def test_loss_bilinear(
    benchmark: BenchmarkFixture, rows: Rows, shape: tuple[int, ...], size: int, loss: str
) -> None:
    """Random low-resolution scores, four targets in five right; autograd runs interpolate too."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(shape, generator=generator)
    own = dagcore.ops.argmax_bilinear(scores, (size, size))
    right = torch.rand(own.shape, generator=generator) < 0.8
    labels = torch.where(right, own, 0).to(rows.device)
    scores = scores.to(rows.device)
    compare(
        benchmark,
        rows,
        "loss_seed_bilinear",
        f"{loss} {'x'.join(map(str, shape))} -> {size}",
        lambda: dagcore.ops.loss_seed_bilinear(scores, labels, loss=loss),
        {"autograd": lambda: by_autograd(loss, scores, labels, align_corners=False)},
        rounds=9,
    )


@pytest.mark.parametrize("align_corners", [True, False], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("network", DEEPLABS)
@pytest.mark.skipif(not REAL.is_dir(), reason="the networks of ../shared/real are not there")
def test_loss_bilinear_real(rows: Rows, network: str, loss: str, align_corners: bool) -> None:
    """A DeepLab's scores of a photograph, 33 -> 513, with its own labels."""
    size = (513, 513)
    image = torch.nn.functional.interpolate(photograph("dog"), size, mode="bilinear")
    with torch.no_grad():
        scores = load_network(network)(image).to(rows.device)
    labels = dagcore.ops.argmax_bilinear(scores, size, align_corners=align_corners)
    sides: dict[str, Callable[[], object]] = {
        "native": lambda: dagcore.ops.loss_seed_bilinear(
            scores, labels, loss=loss, align_corners=align_corners
        ),
        "autograd": lambda: by_autograd(loss, scores, labels, align_corners),
    }
    case = f"{loss} {network} {'aligned' if align_corners else 'not aligned'}"
    rows.add("loss_seed_bilinear", case, alternate(sides, 9, device=rows.device))


@pytest.mark.parametrize("label_dtype", [torch.int64, torch.uint8], ids=name_of)
@pytest.mark.parametrize("kind", ["random", "smooth"])
@pytest.mark.parametrize(
    ("shape", "size"),
    [((1, 21, 64, 64), 512), ((4, 21, 64, 64), 512), ((1, 150, 128, 128), 512)],
    ids=str,
)
def test_bilinear(
    benchmark: BenchmarkFixture,
    rows: Rows,
    shape: tuple[int, ...],
    size: int,
    kind: str,
    label_dtype: torch.dtype,
) -> None:
    """Low-resolution scores, all targets correct; the floor is `clone` of scores and labels."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(shape, generator=generator)
    if kind == "smooth":
        coarse = torch.randn(*shape[:2], 8, 8, generator=generator)
        scores = torch.nn.functional.interpolate(coarse, shape[2:], mode="bicubic")
    scores = scores.to(rows.device)
    labels = dagcore.ops.argmax_bilinear(scores, (size, size)).to(label_dtype)
    adversarial = (labels + 1) % shape[1]
    case = f"{'x'.join(map(str, shape))} -> {size} {kind}, labels {name_of(label_dtype)}"
    compare(
        benchmark,
        rows,
        "dag_seed_bilinear",
        case,
        lambda: dagcore.ops.dag_seed_bilinear(scores, labels, adversarial),
        {
            "reference": lambda: dagcore.reference.dag_seed_bilinear(scores, labels, adversarial),
            "floor": lambda: (scores.clone(), labels.clone(), adversarial.clone()),
        },
    )
    sides: dict[str, Callable[[], object]] = {
        "native": lambda: dagcore.ops.dag_seed_bilinear(scores, labels, adversarial),
        "with a margin": lambda: dagcore.ops.dag_seed_bilinear(
            scores, labels, adversarial, margin=1.0
        ),
    }
    rows.add("dag_seed_bilinear", f"{case}, alone", alternate(sides, 31, device=rows.device))
    if label_dtype == torch.int64:
        compare_argmax(rows, f"{'x'.join(map(str, shape))} -> {size} {kind}", scores, (size, size))


@pytest.mark.parametrize("align_corners", [True, False], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("photo", ["bird", "dog"])
@pytest.mark.parametrize("network", DEEPLABS)
@pytest.mark.skipif(not REAL.is_dir(), reason="the networks of ../shared/real are not there")
def test_bilinear_real(rows: Rows, network: str, photo: str, align_corners: bool) -> None:
    """A DeepLab's scores, 33 -> 513: its own labels, then another one at every second pixel."""
    size = (513, 513)
    image = torch.nn.functional.interpolate(photograph(photo), size, mode="bilinear")
    with torch.no_grad():
        scores = load_network(network)(image).to(rows.device)
    own = dagcore.ops.argmax_bilinear(scores, size, align_corners=align_corners)
    striped = own.clone()
    striped[:, :, 1::2] = (own[:, :, 1::2] + 1) % scores.shape[1]
    corners = "aligned" if align_corners else "not aligned"
    for kind, labels in (("own", own), ("striped", striped)):
        case = f"{network} {photo} {corners}, {kind} labels"
        compare_bilinear(rows, case, scores, labels, align_corners)


@pytest.mark.parametrize("align_corners", [True, False], ids=["aligned", "not aligned"])
def test_bilinear_noise(rows: Rows, align_corners: bool) -> None:
    """Smooth scores with noise, half the labels random: few cells have one winner or one label."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 21, 8, 8, generator=generator)
    scores = torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic")
    scores = scores + 0.3 * torch.randn(scores.shape, generator=generator)
    labels = dagcore.ops.argmax_bilinear(scores, (512, 512), align_corners=align_corners)
    other = torch.randint(0, 21, labels.shape, generator=generator)
    labels = torch.where(torch.rand(labels.shape, generator=generator) < 0.5, other, labels)
    case = f"1x21x64x64 -> 512 with noise, {'aligned' if align_corners else 'not aligned'}"
    scores, labels = scores.to(rows.device), labels.to(rows.device)
    compare_bilinear(rows, case, scores, labels, align_corners)


def compare_bilinear(
    rows: Rows,
    case: str,
    scores: torch.Tensor,
    labels: torch.Tensor,
    align_corners: bool,
) -> None:
    """Each call after the reference's, and again at once, when the labels are in the caches."""
    adversarial = (labels + 1) % scores.shape[1]

    def native() -> object:
        return dagcore.ops.dag_seed_bilinear(
            scores, labels, adversarial, align_corners=align_corners
        )

    def reference() -> object:
        return dagcore.reference.dag_seed_bilinear(
            scores, labels, adversarial, align_corners=align_corners
        )

    sides = {"reference": reference, "native": native, "again": native}
    times = alternate(sides, 15, device=rows.device, clock=rows.clock)
    rows.add("dag_seed_bilinear", case, times)


def compare_argmax(rows: Rows, case: str, scores: torch.Tensor, size: tuple[int, int]) -> None:
    sides: dict[str, Callable[[], object]] = {
        "native": lambda: dagcore.ops.argmax_bilinear(scores, size),
        "reference": lambda: dagcore.reference.argmax_bilinear(scores, size),
        "floor": lambda: scores.clone(),
    }
    rows.add("argmax_bilinear", case, alternate(sides, 9, device=rows.device))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("epsilon", [None, 8 / 255], ids=["no ball", "ball"])
def test_linf_step(
    benchmark: BenchmarkFixture, rows: Rows, epsilon: float | None, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (8, 3, 512, 512)
    origin = torch.rand(shape, generator=generator).to(rows.device, dtype)
    gradient = torch.randn(shape, generator=generator).to(rows.device, dtype)
    images = origin.clone()
    active = torch.ones(8, dtype=torch.int32, device=rows.device)

    settings = {"gamma": 2 / 255, "lower": 0.0, "upper": 1.0, "epsilon": epsilon}
    shadow, grid = images.clone(), images.clone()

    def step(backend: object) -> Callable[[], object]:
        return lambda: backend.linf_step_(  # type: ignore[attr-defined]
            images, origin, gradient, active, **settings
        )

    def on_levels() -> object:
        return dagcore.ops.linf_step_(
            shadow, origin, gradient, active, grid=grid, levels=256, **settings
        )

    compare(
        benchmark,
        rows,
        "linf_step_",
        f"8x3x512x512 {name_of(dtype)} {'ball' if epsilon else 'no ball'}",
        step(dagcore.ops),
        {
            "reference": step(dagcore.reference),
            "floor": lambda: images.clone(),
        },
    )
    sides: dict[str, Callable[[], object]] = {"native": step(dagcore.ops), "on levels": on_levels}
    case = f"8x3x512x512 {name_of(dtype)} {'ball' if epsilon else 'no ball'}, alone"
    rows.add("linf_step_", case, alternate(sides, 31, device=rows.device))


def plain_step(
    images: torch.Tensor,
    origin: torch.Tensor,
    gradient: torch.Tensor,
    *,
    norm: str,
    alpha: float,
    epsilon: float,
    momentum: torch.Tensor | None = None,
    decay: float = 0.0,
    previous: torch.Tensor | None = None,
    share: float = 1.0,
) -> None:
    """The step of pgd_step_ as attacks write it in PyTorch: for the whole batch, unchecked."""

    def size(values: torch.Tensor, order: int) -> torch.Tensor:
        return torch.linalg.vector_norm(values, order, dim=(1, 2, 3), keepdim=True)

    def project(values: torch.Tensor) -> torch.Tensor:
        r = values - origin
        if norm == "linf":
            r = r.clamp(-epsilon, epsilon)
        else:
            r = r * (epsilon / size(r, 2).clamp(min=1e-12)).clamp(max=1)
        return (origin + r).clamp(0, 1)

    if momentum is not None:
        momentum.mul_(decay).add_(gradient / size(gradient, 1))
        gradient = momentum
    z = project(
        images + alpha * (gradient.sign() if norm == "linf" else gradient / size(gradient, 2))
    )
    if previous is not None:
        z = project(images + share * (z - images) + (1 - share) * (images - previous))
        previous.copy_(images)
    images.copy_(z)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", ["PGD", "momentum", "APGD"])
@pytest.mark.parametrize("count", [1, 8])
def test_pgd_step(
    benchmark: BenchmarkFixture, rows: Rows, count: int, kind: str, norm: str
) -> None:
    """The floor is `clone` of the images."""
    generator = torch.Generator().manual_seed(0)
    shape, active = (count, 3, 512, 512), torch.ones(count, dtype=torch.int32, device=rows.device)
    origin = torch.randint(0, 256, shape, generator=generator).to(rows.device) / 255
    gradient = torch.randn(shape, generator=generator).to(rows.device)
    length = 2 / 255 if norm == "linf" else 0.5
    settings: dict[str, object] = {"norm": norm, "alpha": length, "epsilon": 4 * length}

    def side(step: Callable[..., object], **more: object) -> Callable[[], object]:
        images, given = origin.clone(), settings | more
        if kind == "momentum":
            given |= {"momentum": torch.zeros_like(origin), "decay": 0.75}
        if kind == "APGD":
            given |= {"previous": origin.clone(), "share": 0.75}
        return lambda: step(images, origin, gradient, **given)

    bounds = {"active": active, "lower": 0.0, "upper": 1.0}
    native = side(dagcore.ops.pgd_step_, **bounds)
    case = f"{kind} {norm} {'x'.join(map(str, shape))}"
    others = {"PyTorch": side(plain_step), "floor": lambda: origin.clone()}
    compare(benchmark, rows, "pgd_step_", case, native, others)
    on_levels = side(dagcore.ops.pgd_step_, **bounds, grid=origin.clone(), levels=256)
    times = alternate({"native": native, "on levels": on_levels}, 31, device=rows.device)
    rows.add("pgd_step_", f"{case}, alone", times)


@pytest.mark.parametrize("count", [1, 8])
def test_linf_prox(benchmark: BenchmarkFixture, rows: Rows, count: int) -> None:
    """Steps of a perturbation of 4/255 that shrinks; the floor is `clone` of the images."""
    generator = torch.Generator().manual_seed(0)
    shape, active = (count, 3, 512, 512), torch.ones(count, dtype=torch.int32, device=rows.device)
    origin = torch.rand(shape, generator=generator).to(rows.device)
    noise = (torch.rand(shape, generator=generator) - 0.5) * 8 / 255
    begin = (origin + noise.to(rows.device)).clamp(0, 1)
    gradient = torch.randn(shape, generator=generator).to(rows.device)
    metric = 1 + torch.rand(shape, generator=generator).to(rows.device)

    def side(step: Callable[..., object]) -> Callable[[], object]:
        images = begin.clone()

        def run() -> object:
            images.copy_(begin)
            return step(
                images,
                origin,
                gradient,
                metric,
                active,
                alpha=1e-3,
                weight=1e4,
                lower=0.0,
                upper=1.0,
            )

        return run

    others = {"reference": side(dagcore.reference.linf_prox_), "floor": lambda: origin.clone()}
    case = "x".join(map(str, shape))
    compare(benchmark, rows, "linf_prox_", case, side(dagcore.ops.linf_prox_), others, rounds=7)
