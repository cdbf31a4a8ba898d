"""The pictures of docs/attacks and docs/losses: `python docs/pictures.py [NAME ...]`.

Losses are drawn from `dagcore.ops.loss_seed`, attacks from runs on the zoo's FCN-VGG and scenes.
Names are those of the files without their ending, such as loss-cosine; all of them by default. The
same machine, weights and libraries give the same bytes. Takes a few minutes on one core.
"""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import dagcore
from dagcore.attacks.base import open_slots
from dagcore.checks import LOSSES
from dagcore.data import Scenes
from dagcore.engine.networks import Targets

OUT = Path(__file__).parent / "pictures"
MOST_BYTES = 60_000
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dagcore",
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans", "Verdana"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.3",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "grid.color": "0.9",
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
BLUE, ORANGE, GREEN, RED, PURPLE = "#1f6fb4", "#d9730d", "#2f8f4e", "#c0392b", "#7d4fa3"
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE)
GREY = "0.55"

Drawn = Callable[[], Figure]
PICTURES: dict[str, Drawn] = {}


def picture(name: str) -> Callable[[Drawn], Drawn]:
    """Register what draws a picture."""

    def register(draw: Drawn) -> Drawn:
        PICTURES[name] = draw
        return draw

    return register


def panels() -> tuple[Figure, Sequence[Axes]]:
    """Two panels side by side."""
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.7), layout="constrained")
    return figure, axes


def shares(axes: Axes, label: str = "active share") -> None:
    """Updates from 0 on, and shares from 0 to 1."""
    axes.set(xlabel="update", ylabel=label, ylim=(-0.03, 1.03))
    axes.set_xlim(left=0)


# --- losses: three classes, the label's score m, the others' 0 and -2

OTHERS = (0.0, -2.0)
# Where a curve may jump: at the decision boundary, and kappa before it.
KAPPA = 2.0
SIDES = ((-6.0, -KAPPA), (-KAPPA, 0.0), (0.0, 6.0))
CURVES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "blended-cross-entropy": [(f"blend = {b:g}", {"blend": b}) for b in (0.0, 0.25, 0.5)],
    "tsallis": [(f"q = {q:g}", {"q": q}) for q in (0.5, 0.0, -2.0)],
    "margin": [(f"kappa = {k:g}", {"kappa": k}) for k in (0.0, KAPPA)],
    "dag": [(f"kappa = {k:g}", {"kappa": k}) for k in (0.0, KAPPA)],
}


def curve(loss: str, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Margins, the loss there and the norm of its gradient, broken where it may jump."""
    pieces: list[tuple[Tensor, ...]] = []
    for low, high in SIDES:
        m = torch.linspace(low + 1e-9, high - 1e-9, 81, dtype=torch.float64)
        scores = torch.stack([m, *(torch.full_like(m, other) for other in OTHERS)], 1)  # (N, C)
        aim = "runner-up" if loss == "dag" else None
        labels = torch.zeros(len(m), dtype=torch.int64)
        seed, value, _ = dagcore.ops.loss_seed(scores, labels, aim, loss=loss, **settings)
        gap = m.new_full((1,), math.nan)
        pieces += [(m, value, seed.norm(dim=1)), (gap, gap, gap)]
    m, value, size = (torch.cat(column) for column in zip(*pieces, strict=True))
    return m, value, size


def draw_loss(loss: str) -> Figure:
    """The loss and the norm of its gradient against the margin."""
    figure, (left, right) = panels()
    entropy, _, size = curve("cross-entropy")
    if loss != "cross-entropy":
        right.plot(entropy, size, color=GREY, linewidth=1, linestyle="--", label="cross-entropy")
    curves = CURVES.get(loss, [("", {})])
    for (label, settings), colour in zip(curves, COLOURS, strict=False):
        m, value, size = curve(loss, **settings)
        wide = 3.0 if label == "kappa = 0" else 1.6  # where two lie on each other, both show
        left.plot(m, value, color=colour, label=label or None, linewidth=wide)
        right.plot(m, size, color=colour, linewidth=wide)
    right.set_ylim(bottom=-0.05)
    for axes, name in ((left, "loss"), (right, "norm of its gradient")):
        axes.axvline(0, color="0.2", linewidth=0.8)
        axes.set(xlabel="margin of the label over the best other class", ylabel=name, xlim=(-6, 6))
        for place, side, word in ((0.48, "right", "fooled"), (0.52, "left", "label wins")):
            axes.text(
                *(place, 1.01), word, transform=axes.transAxes, ha=side, va="bottom", color="0.4"
            )
    if len(curves) > 1:
        left.legend()
    if loss != "cross-entropy":
        right.legend()
    return figure


for _loss in LOSSES:
    PICTURES[f"loss-{_loss}"] = lambda loss=_loss: draw_loss(loss)


# --- attacks


def generator() -> torch.Generator:
    """The same random choices in each picture."""
    return torch.Generator().manual_seed(0)


def scenes(count: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Test scenes: images (N, 3, H, W) and labels (N, H, W)."""
    found = list(Scenes("07", "test", count=count, first=first))
    return torch.stack([s.image for s in found]), torch.stack([s.mask for s in found])


@contextlib.contextmanager
def recorded(network: nn.Module) -> Iterator[list[Tensor]]:
    """The images that a network is given meanwhile."""
    seen: list[Tensor] = []
    hook = network.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].detach().clone())
    )
    try:
        yield seen
    finally:
        hook.remove()


def active_shares(result: dagcore.Result, n: int = 0) -> Tensor:
    """The share of an image's targets that is active after each update."""
    counts = result.active[:, n]
    return counts[counts >= 0] / result.targets[n]


@picture("attack-dag")
def draw_dag() -> Figure:
    """Five images: each stops for itself."""
    network = dagcore.zoo.load("FCN-VGG")
    images, labels = scenes(5)
    figure, (left, right) = panels()
    for n, colour in enumerate(COLOURS):
        one = images[n : n + 1], labels[n : n + 1]
        with recorded(network) as seen:
            result = dagcore.DAG()(network, *one, generator=generator())
        share = active_shares(result)
        size = 1000 * dagcore.perturbation.perceptibility(torch.cat(seen) - one[0])[: len(share)]
        for axes, values in ((left, share), (right, size)):
            axes.plot(values, color=colour, linewidth=1.2)
            axes.plot(len(values) - 1, values[-1], "o", color=colour, markersize=4)
    shares(left)
    right.set(xlabel="update", ylabel="1000 x perceptibility", xlim=(0, None), ylim=(0, None))
    return figure


@picture("attack-pgd")
def draw_pgd() -> Figure:
    """Balls of four radii: what is left, and how much of the image lies at the ball's edge."""
    network = dagcore.zoo.load("FCN-VGG")
    images, labels = scenes(1)
    figure, (left, right) = panels()
    for levels, colour in zip((1, 2, 4, 8), COLOURS, strict=False):
        radius = levels / 255
        attack = dagcore.PGD(epsilon=radius, alpha=radius / 4, steps=20, tolerance=None)
        with recorded(network) as seen:
            result = attack(network, images, labels, generator=generator())
        share = active_shares(result)
        left.plot(share, color=colour, label=f"epsilon = {levels}/255")
        best = int(share.argmin())
        left.plot(best, share[best], "o", color=colour, markersize=5)
        away = (torch.cat(seen) - images).abs() > 0.999 * radius
        right.plot(away.double().flatten(1).mean(1), color=colour)
    shares(left)
    shares(right, "share of values at the edge")
    left.legend()
    return figure


def compared(kinds: Sequence[tuple[str, Any]], axes: Axes, **settings: Any) -> None:
    """Active shares of attacks on one image from the image itself."""
    network = dagcore.zoo.load("FCN-VGG")
    images, labels = scenes(1)
    settings = {"random_start": False, "tolerance": None, "epsilon": 2 / 255, **settings}
    for (label, kind), colour in zip(kinds, COLOURS, strict=False):
        result = kind(**settings)(network, images, labels)
        axes.plot(active_shares(result), color=colour, label=label)
    shares(axes)
    axes.legend()


@picture("attack-segpgd")
def draw_segpgd() -> Figure:
    """Beside PGD; and the weights of its targets."""
    figure, (left, right) = panels()
    steps = 20
    compared([("PGD", dagcore.PGD), ("SegPGD", dagcore.SegPGD)], left, alpha=0.5 / 255, steps=steps)
    t = torch.arange(steps + 1)
    right.plot(1 - t / (2 * steps), color=GREEN, label="correct targets")
    right.plot(t / (2 * steps), color=RED, label="wrong targets")
    shares(right, "weight")
    right.legend()
    return figure


@picture("attack-cospgd")
def draw_cospgd() -> Figure:
    """Beside PGD and SegPGD; and the weights of its targets as they come out."""
    figure, (left, right) = panels()
    settings: dict[str, Any] = {"alpha": 0.5 / 255, "steps": 20}
    kinds = [("PGD", dagcore.PGD), ("SegPGD", dagcore.SegPGD), ("CosPGD", dagcore.CosPGD)]
    compared(kinds, left, **settings)
    network = dagcore.zoo.load("FCN-VGG")
    images, labels = scenes(1)
    attack = dagcore.CosPGD(epsilon=2 / 255, random_start=False, tolerance=None, **settings)
    with recorded(network) as seen:
        attack(network, images, labels)
    weights: dict[str, list[float]] = {"correct targets": [], "wrong targets": []}
    for x in seen:
        with torch.no_grad():
            scores = nn.functional.interpolate(network(x), labels.shape[1:], mode="bilinear")
        p = scores.softmax(1)
        label = torch.where(labels == 255, 0, labels).long()
        weight = p.gather(1, label[:, None])[:, 0] / p.norm(dim=1)
        for name, which in (("correct targets", True), ("wrong targets", False)):
            of = (labels != 255) & ((scores.argmax(1) == label) == which)
            weights[name].append(float(weight[of].mean()))
    for (name, values), colour in zip(weights.items(), (GREEN, RED), strict=True):
        right.plot(values, color=colour, label=name)
    shares(right, "mean weight")
    right.legend()
    return figure


@picture("attack-apgd")
def draw_apgd() -> Figure:
    """Beside PGD; and the step length in one ball and in shrinking ones."""
    figure, (left, right) = panels()
    steps = 60

    def pgd(**settings: Any) -> dagcore.PGD:
        return dagcore.PGD(alpha=0.5 / 255, **settings)

    def apgd(**settings: Any) -> dagcore.APGD:
        return dagcore.APGD(loss="jensen-shannon", **settings)

    kinds = [("PGD, cross-entropy", pgd), ("APGD, cross-entropy", dagcore.APGD)]
    compared([*kinds, ("APGD, jensen-shannon", apgd)], left, steps=steps)
    for label, radii, colour in (("one ball", None, ORANGE), ("shrinking", "shrinking", PURPLE)):
        attack = dagcore.APGD(
            epsilon=2 / 255, steps=steps, radii=radii, random_start=False, tolerance=None
        )
        lengths = step_lengths(attack)
        right.plot(lengths, color=colour, label=label, drawstyle="steps-post")
    right.set_yscale("log", base=2)
    right.yaxis.set_major_formatter(lambda y, _: f"{y:g}" if y >= 1 else f"1/{1 / y:g}")
    right.set(xlabel="update", ylabel="step length / epsilon", xlim=(0, None))
    right.legend()
    return figure


def step_lengths(attack: dagcore.APGD) -> list[float]:
    """The length of each step of an attack on one image, as a part of epsilon."""
    network = dagcore.zoo.load("FCN-VGG")
    images, labels = scenes(1)
    lengths = []
    targets = Targets(labels, attack.assign(None, None))
    slots = open_slots(attack, [attack.network(network)], images, [targets])
    while not slots.finished():
        slots.iterate()
        lengths.append(float(slots.state["alpha"][0]) / attack.epsilon)
    return lengths[:-1]  # after the last evaluation there is no step


@picture("attack-alma-prox")
def draw_alma() -> Figure:
    """The norm of each iterate and the smallest that was enough; and what is left."""
    network = dagcore.zoo.load("FCN-VGG")
    images, labels = scenes(1)
    attack = dagcore.ALMAProx()
    with recorded(network) as seen:
        result = attack(network, images, labels)
    share = active_shares(result)
    size = 255 * (torch.cat(seen)[: len(share)] - images).abs().flatten(1).amax(1)
    enough = share <= 1 - attack.share
    best = torch.where(enough, size, math.inf).cummin(0).values
    best[best.isinf()] = math.nan
    figure, (left, right) = panels()
    left.plot(size, color=BLUE, linewidth=1, label="of the iterate")
    left.plot(best, color=ORANGE, label="smallest that is enough")
    left.set(xlabel="update", ylabel="largest change, of 255", xlim=(0, None), ylim=(0, None))
    left.legend()
    right.plot(share, color=BLUE, linewidth=1)
    right.axhline(1 - attack.share, color=ORANGE, linewidth=1, linestyle="--", label="1 - share")
    shares(right)
    right.set_yscale("symlog", linthresh=0.01)
    right.set_yticks([0, 0.01, 0.1, 1], labels=["0", "0.01", "0.1", "1"])
    right.set_ylim(0, 1.1)
    right.legend()
    return figure


@picture("attack-joint")
def draw_joint() -> Figure:
    """Two networks: a perturbation that is made for one, and one that is made for both."""
    names = ("FCN-VGG", "FCN-Alex")
    networks = [dagcore.zoo.load(name) for name in names]
    images, labels = scenes(1)
    attack = dagcore.DAG()
    with recorded(networks[0]) as seen:
        alone = attack(networks[0], images, labels, generator=generator())
    alone_share = active_shares(alone)
    aims = alone.adversarial_labels
    other = [attack.count_active(networks[1], x, labels, aims) for x in seen[: len(alone_share)]]
    parts = [dagcore.Part(network, labels) for network in networks]
    joint = dagcore.joint_attack(attack, parts, images, generator=generator())
    figure, axes = panels()
    both = [joint.active[:, k, 0] for k in range(2)]
    both_shares = [one[one >= 0] / joint.targets[k, 0] for k, one in enumerate(both)]
    sides = [[alone_share, torch.cat(other) / joint.targets[1, 0]], both_shares]
    for place, curves, word in zip(axes, sides, ("FCN-VGG alone", "both"), strict=True):
        for name, values, colour in zip(names, curves, (BLUE, ORANGE), strict=True):
            place.plot(values, color=colour, label=f"at {name}")
        shares(place)
        place.set_title(f"made for {word}")
        place.legend(loc="center right")
    return figure


@picture("attack-universal")
def draw_universal() -> Figure:
    """Training and unseen images: against updates, and beside noise of the same size."""
    network = dagcore.zoo.load("FCN-VGG")
    radius, updates = 2 / 255, (0, 16, 32, 64, 128)
    sets = {"training images": scenes(48), "unseen images": scenes(16, first=48)}
    samples = [dagcore.Sample(*one) for one in zip(*sets["training images"], strict=True)]

    def right_share(r: Tensor, which: str) -> float:
        images, labels = sets[which]
        with torch.no_grad():
            seen = dagcore.ops.argmax_bilinear(network((images + r).clamp(0, 1)), labels.shape[1:])
        return float(((seen == labels) & (labels != 255)).sum() / (labels != 255).sum())

    found: dict[str, list[float]] = {name: [] for name in sets}
    r = torch.zeros((1, *sets["training images"][0].shape[1:]))
    for steps in updates:
        attack = dagcore.CosPGD(epsilon=radius, alpha=radius / 16, steps=steps)
        made = dagcore.universal_perturbation(attack, network, samples, generator=generator())
        r = made.perturbation
        for name in sets:
            found[name].append(right_share(r, name))
    size = float(r.abs().max())
    noise = size * torch.randn(r.shape, generator=generator()).sign()
    figure, (left, right) = panels()
    for name, colour in zip(sets, (BLUE, ORANGE), strict=True):
        left.plot(updates, found[name], "o-", color=colour, markersize=3, label=name)
    shares(left, "share correct")
    left.legend()
    kinds = {"clean": torch.zeros_like(r), "random signs": noise, "universal": r}
    for k, (name, colour) in enumerate(zip(sets, (BLUE, ORANGE), strict=True)):
        heights = [right_share(one, name) for one in kinds.values()]
        right.bar([x + 0.38 * k - 0.19 for x in range(3)], heights, 0.36, color=colour)
    right.set(ylabel="share correct", ylim=(0, 1.03))
    right.set_xticks(range(3), labels=list(kinds))
    right.grid(axis="x", visible=False)
    return figure


def shortened(drawn: str) -> str:
    """An SVG with two decimals in its coordinates, its words as they are."""
    return re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), drawn)


def main(names: Sequence[str]) -> None:
    """Draw pictures by their names, or all of them."""
    unknown = set(names) - set(PICTURES)
    if unknown:
        raise SystemExit(f"no pictures {sorted(unknown)}: there are {', '.join(PICTURES)}")
    torch.set_num_threads(1)
    OUT.mkdir(exist_ok=True)
    for name in names or PICTURES:
        with mpl.rc_context(STYLE):
            figure = PICTURES[name]()
            path = OUT / f"{name}.svg"
            figure.savefig(path, facecolor="white", metadata={"Date": None, "Creator": None})
            plt.close(figure)
        path.write_text(shortened(path.read_text(encoding="utf-8")), encoding="utf-8")
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise SystemExit(f"{path.name} has {size} bytes, more than {MOST_BYTES}")
        print(f"{path.name}  {size} bytes", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
