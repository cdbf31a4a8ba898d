"""Attacks on dense losses: the engine beside the bare network, beside published loops, and ranks.

    python benchmarks/bench_losses.py iteration | peers | order

iteration  one update of an attack, against the bare network's forward pass and input gradient, the
           network's own repetition telling the noise
peers      whole attacks of a few updates from the same point on the same network: PGD, SegPGD and
           CosPGD by the functions of the `cospgd` package in the loop of its documentation
           (pip install --no-deps cospgd), Auto-PGD by `apgd_train` of SEA where --sea names its
           semseg/attacker.py (github.com/nmndeep/Robust-Segmentation); what they find is compared
order      what PGD, SegPGD and CosPGD leave of the mIoU after 20 updates, on the real DeepLabs of
           ../shared/real (8-bit photographs with masks) and on networks of the zoo (scenes)

Networks of the first two have real architectures and random weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_attack import bare_iteration, full_size, predictions
from bench_real import DEEPLABS, REAL, load_network
from common import alternate, chosen, photographs, save, spread
from networks import NETWORKS
from torch import Tensor, nn
from torch.nn import functional

import dagcore
from dagcore import APGD, PGD, CosPGD, SegPGD, files, victims
from dagcore.attacks.base import open_slots
from dagcore.data import Scenes
from dagcore.engine import freed_memory_kept
from dagcore.engine.networks import Targets
from dagcore.metrics import MeanIoU

EPSILON, ALPHA = 8 / 255, 0.01
LONG: dict[str, Any] = {"steps": 10**4, "tolerance": None, "random_start": False}
ATTACKS: dict[str, Any] = {
    "PGD": PGD(**LONG),
    "SegPGD": SegPGD(**LONG),
    "CosPGD": CosPGD(**LONG),
    "PGD, L2": PGD(**LONG, norm="l2", epsilon=2.0, alpha=0.2),
    "APGD": APGD(**LONG),
    "APGD, jensen-shannon": APGD(**LONG, loss="jensen-shannon"),
}
MEASURED = ("deeplabv3_mobilenet_v3_large", "segformer_b0")


def iteration(options: argparse.Namespace) -> None:
    rows, record = [], []
    for name in chosen(MEASURED, options.networks):
        model = NETWORKS[name]()
        fast = victims.prepare(model)
        images = photographs(1, options.side, options.side)
        labels = predictions(model, images)
        for attack in chosen(ATTACKS, options.attacks):
            with freed_memory_kept():  # as attacks do
                times = alternate(
                    {
                        "bare": bare_iteration(model, images),
                        attack: engine_iteration(ATTACKS[attack], model, images, labels),
                        "bare again": bare_iteration(model, images),
                        "prepared": engine_iteration(ATTACKS[attack], fast, images, labels),
                    },
                    options.rounds,
                    warmup=2,
                )
            own = statistics.median(times["bare"] + times["bare again"])
            row = {"network": name, "side": options.side, "attack": attack}
            row |= {
                f"{side if side != attack else 'engine'} ms": spread(t, 1e3)
                for side, t in times.items()
            }
            middle = {side: statistics.median(t) for side, t in times.items()}
            row["overhead"] = f"{100 * (middle[attack] / own - 1):+.1f} %"
            row["noise"] = f"{100 * (middle['bare again'] / middle['bare'] - 1):+.1f} %"
            row["bare / prepared"] = f"{own / middle['prepared']:.2f}"
            rows.append(row)
            record.append({**row, "seconds": times})
            print(row, flush=True)
    save(options.save, "cpu", rows, record, options.command)


def engine_iteration(
    attack: Any, model: nn.Module, images: Tensor, labels: Tensor
) -> Callable[[], None]:
    """One update of images that never finish."""
    targets = Targets(labels, attack.assign(None, None))
    slots = open_slots(attack, [attack.network(model)], images, [targets])

    def run() -> None:
        slots.iterate()
        assert not slots.finished()

    return run


def peers(options: argparse.Namespace) -> None:
    rows, record = [], []
    steps = options.steps
    settings: dict[str, Any] = {
        "steps": steps,
        "epsilon": EPSILON,
        "tolerance": None,
        "random_start": False,
    }
    here = {
        "PGD": PGD(**settings, alpha=ALPHA),
        "SegPGD": SegPGD(**settings, alpha=ALPHA),
        "CosPGD": CosPGD(**settings, alpha=ALPHA),
        "APGD": APGD(**settings, loss="jensen-shannon", track="cross-entropy"),
    }
    for name in chosen(MEASURED, options.networks):
        model = NETWORKS[name]().requires_grad_(False)
        fast = victims.prepare(model)
        images = photographs(1, options.side, options.side)
        labels = predictions(model, images)
        scores_of = full_size(model, labels)
        for attack in chosen(here, options.attacks):
            if attack == "APGD":
                if options.sea is None:
                    continue
                theirs = of_sea(options.sea, scores_of, images, labels, steps)
            else:
                theirs = of_cospgd(attack, scores_of, images, labels, steps)
            found: dict[str, Tensor] = {}

            def kept(side: str, run: Callable[[], Tensor]) -> Callable[[], None]:
                return lambda: found.update({side: run()})  # noqa: B023  # run at once

            # SEA's returns the iterate with the fewest right, cospgd's loop the last one.
            own, which = here[attack], "adversarial" if attack == "APGD" else "last"

            def attacked(model: nn.Module) -> Tensor:
                found: Tensor = getattr(own(model, images, labels), which)  # noqa: B023
                return found

            sides = {
                "peer": kept("peer", theirs),
                "here": kept("here", lambda: attacked(model)),  # noqa: B023
                "prepared": kept("prepared", lambda: attacked(fast)),  # noqa: B023
            }
            times = alternate(sides, options.rounds, warmup=1)
            middle = {side: statistics.median(t) for side, t in times.items()}
            apart = (found["peer"] - found["here"]).abs()
            row = {"network": name, "side": options.side, "attack": attack, "updates": steps}
            row |= {f"{side} s": spread(t) for side, t in times.items()}
            row["peer / here"] = f"{middle['peer'] / middle['here']:.2f}"
            row["peer / prepared"] = f"{middle['peer'] / middle['prepared']:.2f}"
            row["pixels apart by a step or more"] = (
                f"{100 * float((apart > ALPHA / 2).float().mean()):.2f} %"
            )
            row["right, peer / here"] = " / ".join(
                f"{100 * float((scores_of(found[side]).argmax(1) == labels).float().mean()):.2f} %"
                for side in ("peer", "here")
            )
            rows.append(row)
            record.append({**row, "seconds": times})
            print(row, flush=True)
    save(options.save, "cpu", rows, record, options.command)


def of_cospgd(
    attack: str,
    scores_of: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    steps: int,
) -> Callable[[], Tensor]:
    """The loop of cospgd's documentation, with its functions."""
    from cospgd import functions

    def run() -> Tensor:
        x = images.clone()
        for t in range(steps):
            x.requires_grad_()
            scores = scores_of(x)
            loss = functional.cross_entropy(scores, labels.long(), reduction="none")
            if attack == "SegPGD":
                loss = functions.segpgd_scale(
                    predictions=scores, labels=labels, loss=loss, iteration=t, iterations=steps
                )
            elif attack == "CosPGD":
                loss = functions.cospgd_scale(
                    predictions=scores,
                    labels=labels.long(),
                    loss=loss,
                    num_classes=scores.shape[1],
                )
            (gradient,) = torch.autograd.grad(loss.mean(), x)
            x = functions.step_inf(
                perturbed_image=x,
                epsilon=EPSILON,
                data_grad=gradient,
                orig_image=images,
                alpha=ALPHA,
                targeted=False,
                clamp_min=0,
                clamp_max=1,
            )
        with torch.no_grad():
            scores_of(x)  # what has come of it, which the attack here knows
        return x

    return run


def of_sea(
    path: Path,
    scores_of: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    steps: int,
) -> Callable[[], Tensor]:
    """SEA's Auto-PGD, as it is; it imports norms that it does not need here."""
    stand_in = types.ModuleType("autoattack.other_utils")
    for name in ("L0_norm", "L1_norm", "L2_norm", "Logger"):
        setattr(stand_in, name, None)
    sys.modules.setdefault("autoattack", types.ModuleType("autoattack"))
    sys.modules.setdefault("autoattack.other_utils", stand_in)
    spec = importlib.util.spec_from_file_location("sea_attacker", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Model:
        training = False

        def __call__(self, x: Tensor) -> Tensor:
            return scores_of(x)

    def run() -> Tensor:
        *_, best = module.apgd_train(
            Model(),
            images,
            labels.long(),
            "Linf",
            EPSILON,
            n_iter=steps,
            loss="js-avg",
            track_loss="ce-avg",
        )
        found: Tensor = best
        return found

    return run


Pictures = list[tuple[Tensor, Tensor]]  # images (1, 3, H, W) and labels (1, H, W)


def order(options: argparse.Namespace) -> None:
    rows, record = [], []
    for name, model, pictures, classes in victims_of(options):
        for epsilon in options.epsilons:
            row: dict[str, Any] = {"network": name, "images": len(pictures)}
            row["epsilon"] = f"{epsilon:g}/255"
            row["clean"] = f"{miou(model, pictures, [x for x, _ in pictures], classes):.1f}"
            left = {}
            for attack in (PGD, SegPGD, CosPGD):
                own = attack(
                    steps=options.steps,
                    epsilon=epsilon / 255,
                    alpha=options.alpha * epsilon / 255,
                    tolerance=None,
                )
                seeds = torch.Generator().manual_seed(0)
                attacked = [own(model, x, y, generator=seeds).last for x, y in pictures]
                left[attack.__name__] = miou(model, pictures, attacked, classes)
                row[attack.__name__] = f"{left[attack.__name__]:.1f}"
            row["order holds"] = left["CosPGD"] < left["SegPGD"] < left["PGD"]
            rows.append(row)
            record.append({**row, "left": left})
            print(row, flush=True)
    note = "mIoU in percent of what the last of 20 iterates leaves, over all images together."
    save(options.save, "cpu", rows, record, options.command, note)


def victims_of(options: argparse.Namespace) -> Sequence[tuple[str, Any, Pictures, int]]:
    """Networks with pictures and true labels."""
    found: list[tuple[str, Any, Pictures, int]] = []
    for name in chosen(DEEPLABS, options.networks) if REAL.exists() else ():
        pictures = []
        for mask in sorted((REAL / "photos").glob("*.labels.png")):
            photo = mask.with_name(mask.name.replace(".labels", ""))
            labels = files.read_label_map(mask)[None]
            labels = torch.where(labels == files.IGNORE, 255, labels)  # as in the masks of scenes
            pictures.append((files.read_image(photo)[None], labels))
        found.append((name, load_network(name), pictures, 21))
    for name in chosen(("FCN-VGG", "DL-VGG", "DL-RN101"), options.networks):
        scenes = Scenes("07", "test", count=options.images)
        pictures = [(scene.image[None], scene.mask[None]) for scene in scenes]
        model = victims.load(name)
        found.append((name, model, pictures, len(model.classes)))
    return found


def miou(model: Any, pictures: Pictures, images: Sequence[Tensor], classes: int) -> float:
    """Of images that are a network's, in percent."""
    measure = MeanIoU(classes)
    with torch.no_grad():
        for (_, labels), image in zip(pictures, images, strict=True):
            scores = model(image)
            seen = dagcore.ops.argmax_bilinear(
                scores,
                tuple(labels.shape[1:]),
                align_corners=getattr(scores, "align_corners", False),
            )
            measure.update(seen, labels)
    return float(measure.compute().mean)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("iteration", "peers", "order"))
    parser.add_argument("--networks", nargs="+")
    parser.add_argument("--attacks", nargs="+")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1.0])
    parser.add_argument("--alpha", type=float, default=0.3, help="step length, of epsilon")
    parser.add_argument("--sea", type=Path, help="SEA's semseg/attacker.py")
    parser.add_argument("--save", metavar="NAME", help="keep the table in benchmarks/results")
    options = parser.parse_args()
    options.steps = options.steps or (20 if options.what == "order" else 5)
    given = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    options.command = " ".join(["python benchmarks/bench_losses.py", *given])
    {"iteration": iteration, "peers": peers, "order": order}[options.what](options)


if __name__ == "__main__":
    main()
