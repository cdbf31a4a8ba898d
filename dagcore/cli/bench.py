"""The command `dagcore bench`: time the ops and the updates of attacks on this machine."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from .. import ops, reference
from ..attacks import APGD, DAG, PGD, Attack, CosPGD, SegPGD
from ..checks import NORMS
from ..engine import ScoreModel, frozen
from ..engine.memory import freed_memory_kept
from ..engine.networks import input_gradient
from ..errors import ArgumentError
from ..evaluation import faults
from ..evaluation.options import find_device
from ..files import atomic_write
from ..info import versions
from ..timing import Sides, alternate, spread
from ..victims import Detector, Victim, load, prepare
from . import options
from .progress import print_table

Row = dict[str, Any]

Shape = tuple[int, int, int, int]
SHAPES: tuple[Shape, ...] = ((1, 21, 512, 512), (4, 21, 512, 512), (1, 150, 512, 512))
UPDATES = 4
MEASURED_LOSSES = ("cross-entropy", "jensen-shannon", "cosine", "dlr")

EXAMPLES = """
\b
Examples:
  dagcore bench
  dagcore bench --model DL-VGG --size 160x128 --json times.json
  dagcore bench --model fcn_resnet50 --batch 4 --device cuda
"""


def measure_ops(shapes: Sequence[Shape], rounds: int, device: str) -> list[Row]:
    """Time each op beside the reference, and beside a `clone` of the tensor that it reads."""
    rows = []
    for shape in shapes:
        generator = torch.Generator().manual_seed(0)
        scores = torch.randn(shape, generator=generator)
        right = torch.rand(shape[:1] + shape[2:], generator=generator) < 0.8
        labels = torch.where(right, scores.argmax(1), 0).to(torch.uint8).to(device)
        adversarial = (labels + 1) % shape[1]
        scores = scores.to(device)
        low = scores[:, :, ::8, ::8].contiguous()
        for op, read in (("dag_seed", scores), ("dag_seed_bilinear", low)):
            rows.append(_row(op, read.shape, _sides(op, read, labels, adversarial), rounds, device))
        for op, read in (("loss_seed", scores), ("loss_seed_bilinear", low)):
            for loss in MEASURED_LOSSES:
                sides = _sides(op, read, labels, loss=loss)
                rows.append(_row(f"{op}, {loss}", read.shape, sides, rounds, device))
    images = torch.rand(8, 3, 512, 512, generator=torch.Generator().manual_seed(0)).to(device)
    gradient = torch.randn(images.shape, generator=torch.Generator().manual_seed(1)).to(device)
    active = torch.ones(len(images), dtype=torch.int32, device=device)
    bounds: dict[str, Any] = {"lower": 0.0, "upper": 1.0, "epsilon": 8 / 255}
    given = images, images.clone(), gradient, active
    sides = _sides("linf_step_", *given, **bounds, gamma=2 / 255)
    rows.append(_row("linf_step_", images.shape, sides, rounds, device))
    for norm in NORMS:
        sides = _sides("pgd_step_", *given, **bounds, norm=norm, alpha=2 / 255)
        rows.append(_row(f"pgd_step_, {norm}", images.shape, sides, rounds, device))
    return rows


def _sides(op: str, read: Tensor, *others: Tensor, **options: Any) -> Sides:
    native, plain = (getattr(module, op) for module in (ops, reference))
    return {
        "native": lambda: native(read, *others, **options),
        "reference": lambda: plain(read, *others, **options),
        "floor": lambda: read.clone(),
    }


def _row(
    what: str, shape: Sequence[int], sides: Sides, rounds: int, device: str, per: int = 1
) -> Row:
    """Return a row with the times of each side in seconds, divided by `per` updates."""
    times = alternate(sides, rounds, device=device)
    seconds = {name: [s / per for s in found] for name, found in times.items()}
    return {"what": what, "case": "x".join(map(str, shape)), "seconds": seconds}


def measure_updates(
    model: str,
    weights: Path | None,
    shape: tuple[int, int, int],  # (N, H, W)
    updates: int,
    rounds: int,
    device: str,
) -> list[Row]:
    """Time an update of each attack on a segmentation network, beside the network's bare gradient.

    Each attack runs `updates` updates, and its time is divided by them. The images are noise, and
    their labels are the network's own predictions, so that most targets are active. Only DAG has a
    reference.

    Raises:
        ValueError: if the network is a detector, or cannot take images of this size.
    """
    victim = load(model, weights, torch.device(device))
    if isinstance(victim, Detector):
        raise ArgumentError(f"--model must be a segmentation network, got {model}, a detector")
    count, height, width = shape
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((count, 3, height, width), generator=generator).to(device)
    try:
        with frozen(victim), torch.no_grad():
            labels = ops.argmax_bilinear(
                ScoreModel(victim)(images, images[:, 0].long()), (height, width)
            )
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ArgumentError(
            f"--model {model} cannot take {width}x{height} pixels: {reason}"
        ) from None
    try:
        prepared = prepare(victim)
    except RuntimeError as error:
        raise ArgumentError(f"--model {model} cannot be prepared: {error}") from error
    plain, fused = (DAG(max_iter=updates, backend=one) for one in ("reference", "native"))
    common: dict[str, Any] = {"steps": updates, "tolerance": None}
    attacks: dict[str, Attack] = {
        "DAG": fused,
        "PGD": PGD(**common),
        "SegPGD": SegPGD(**common),
        "CosPGD": CosPGD(**common),
        "APGD": APGD(**common),
    }
    rows = []
    for name, attack in attacks.items():
        aims = "runner-up" if attack is fused else "untargeted"

        def run(on: Any, attack: Attack = attack, aims: str = aims) -> Callable[[], object]:
            return lambda: attack(on, images, labels, aims)

        slow = {"reference": run(victim, plain)} if attack is fused else {}
        sides: Sides = {
            "bare network": lambda: _bare(victim, images, labels, updates),
            **slow,
            "native": run(victim),
            "native, prepared": run(prepared),
        }
        rows.append(_row(f"{model}, {name}", images.shape, sides, rounds, device, per=updates))
    return rows


def _bare(victim: Victim, images: Tensor, labels: Tensor, updates: int) -> None:
    """Run the network's forward pass and input gradient as often as an attack's updates do."""
    reader = ScoreModel(victim)
    with frozen(victim):
        for _ in range(updates):
            leaf = images.detach().requires_grad_()
            scores = reader(leaf, labels)
            input_gradient(scores, leaf, torch.ones_like(scores))


def report(rows: list[Row], device: str, path: Path | None) -> None:
    """Print medians in ms with ratios, and write all times to `path` unless it is None."""
    for of_ops in (True, False):
        chosen = [row for row in rows if ("floor" in row["seconds"]) == of_ops]
        if not chosen:
            continue
        sides, table = list(chosen[0]["seconds"]), []
        for row in chosen:
            seconds = row["seconds"]
            cells = [spread(seconds[side], 1e3) if side in seconds else "" for side in sides]
            ratio = ""
            if "reference" in seconds:
                middle = [statistics.median(seconds[side]) for side in ("reference", "native")]
                ratio = f"{middle[0] / middle[1]:.1f}"
            table.append([row["what"], row["case"], *cells, ratio])
        names = ("", "case", *(f">{side}, ms" for side in sides), ">reference / native")
        print_table(names, table, width=160)
    if path is not None:
        known = {"device": device, "threads": torch.get_num_threads(), "versions": versions()}
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps({**known, "rows": rows}, indent=1) + "\n")
        print(f"written to {path}")


def bench(
    model: str | None,
    weights: Path | None,
    shape: tuple[int, int, int],
    rounds: int,
    device: str,
    path: Path | None,
    *,
    shapes: Sequence[Shape] = SHAPES,
    updates: int = UPDATES,
) -> None:
    """Time the ops on scores of some shapes and, with a model, its updates; print the results."""
    with freed_memory_kept(), faults.of_model(model):
        of_updates = []  # first, so that an invalid model fails early
        if model is not None:
            of_updates = measure_updates(model, weights, shape, updates, rounds, device)
        of_ops = measure_ops(shapes, rounds, device)
    report(of_ops + of_updates, device, path)


@click.command("bench", epilog=EXAMPLES)
@options.model(note=" Without it only the ops are timed. Detectors are not supported.")
@click.option(
    "--size",
    metavar="WIDTHxHEIGHT",
    callback=options.size,
    default="512x512",
    help="Size of the network's input images.",
)
@options.count("--batch", default=1, help="Number of images in a batch.")
@options.count("--rounds", default=9, help="Number of times that each side is timed.")
@options.device
@click.option(
    "--json", "path", type=options.FOLDER, metavar="FILE", help="File to which to write all times."
)
def command(size: tuple[int, int], batch: int, device: str | None, **given: Any) -> None:
    """Time the ops on this machine and, with --model, the updates of attacks on a network.

    Each op is timed beside its plain PyTorch reference and beside its floor, a copy of what it
    reads. Each update is timed beside its floor, the bare network's gradient, and DAG's also beside
    the reference. An attack also evaluates the images that it returns, which the floor does not.
    The sides run in alternation. The table shows medians and quartiles.
    """
    bench(shape=(batch, *size), device=str(find_device(device)), **given)
