"""Attacks on networks with real weights: two DeepLabs for VOC, a NanoDet for COCO.

    python benchmarks/bench_real.py outcome | paper | epsilon | speed | alma | figure

outcome  whole attacks, in float32, on 256 levels, and on these with a margin: updates, beside those
         of a plain loop, perceptibility, and the share of the targets that is right again in the
         8-bit file, at the attacked network and at the other DeepLab
paper    the paper's protocol on the two DeepLabs, beside which the zoo's tables stand: annotated
         classes permuted, a perturbation for each network, their sum, the sum with rows and columns
         permuted, one for both, and the same on 256 levels with a margin; what is left of each
         network's score
epsilon  the largest change of a pixel in the file, for balls that are no multiple of 1/255 too
speed    seconds of an update, against the bare network's forward pass and input gradient, the
         network's own repetition telling the noise, and against the `dag` of adv-lib
         (pip install --no-deps adv-lib)
alma     `ALMAProx` beside the `alma_prox` of adv-lib: the largest change of a pixel with which 99 %
         of the targets are fooled, and the seconds of the whole attack, in alternation
figure   the README's first picture: a DeepLab and NanoDet on photographs of scikit-image, attacked
         on 256 levels, with what they see in the files

Networks and annotated photographs are read from ../shared/real, see its README. But for `paper` the
DeepLabs are attacked on their own predictions, each class to become the next; NanoDet on what it
finds with a score of 0.35 or more in photographs of scikit-image, classes permuted.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_attack import GAMMA, adv_lib_dag, bare_iteration, full_size
from common import RESULTS, alternate, chosen, save, spread
from torch import Tensor, nn

import dagcore
from dagcore import DAG, Part, files, joint_attack, victims
from dagcore.attacks.base import open_slots
from dagcore.engine import freed_memory_kept
from dagcore.engine.networks import Targets
from dagcore.evaluation.figures import attack_figure
from dagcore.evaluation.predict import predict
from dagcore.labels import assign
from dagcore.metrics import VOID, MeanIoU
from dagcore.perturbation import combine, permute

REAL = Path(__file__).parents[2] / "shared" / "real"
DEEPLABS = ("deeplab_voc", "deeplab_voc_narrow")
PHOTOGRAPHS = {
    "deeplab_voc": ("bird", "dog"),
    "deeplab_voc_narrow": ("bird", "dog"),
    "nanodet_coco": ("chelsea", "astronaut"),
}
SIDE = 416  # of NanoDet's images
RADII = {"0.03": 0.03, "0.01": 0.01, "1.6/255": 1.6 / 255, "8/255": 8 / 255, "0.001": 0.001}


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """A network, an image, and what the attack on it aims at."""

    name: str
    photograph: str
    model: Any
    image: Tensor  # (1, 3, H, W)
    labels: Tensor  # (1, *T)
    adversarial: Tensor  # (1, *T)

    def attack(self, attack: DAG) -> dagcore.Result:
        return attack(self.model, self.image, self.labels, self.adversarial)


def real_networks() -> Any:
    """The module that loads the networks."""
    spec = importlib.util.spec_from_file_location("real_networks", REAL / "networks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_network(name: str) -> Any:
    """A network of ../shared/real; NanoDet as the victim that reports what it itself would."""
    module = real_networks()
    path = REAL / f"{name}.safetensors"
    if name in DEEPLABS:
        return module.load_deeplab(path)
    return victims.dense_detector(module.load_nanodet(path), threshold=0.35, classes=module.COCO)


def photograph(name: str) -> Tensor:
    """One of the annotated photographs, or one of scikit-image at NanoDet's size."""
    path = REAL / "photos" / f"{name}.png"
    if path.exists():
        return files.read_image(path)[None]
    import numpy as np
    import skimage.data
    from PIL import Image

    whole = Image.fromarray(getattr(skimage.data, name)())
    pixels = np.array(whole.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous().float() / 255


def works(options: argparse.Namespace) -> Iterator[Work]:
    for name in chosen(PHOTOGRAPHS, options.networks):
        model = load_network(name)
        for photo in chosen(PHOTOGRAPHS[name], options.photographs):
            yield aimed(name, photo, model)


def aimed(name: str, photo: str, model: Any) -> Work:
    """A network and a photograph, with what the attack aims at."""
    image = photograph(photo)
    if name in DEEPLABS:
        with torch.no_grad():
            labels = scores_at_targets(model, image).argmax(1)
        return Work(name, photo, model, image, labels, (labels + 1) % 21)
    generator = torch.Generator().manual_seed(0)
    targets = model.dense_targets(image, confidence=0.35, generator=generator)
    return Work(name, photo, model, image, targets.labels, targets.adversarial_labels)


def scores_at_targets(model: nn.Module, images: Tensor) -> Tensor:
    """Scores (N, C, *T) at all targets, enlarged where they are coarser."""
    scores: Tensor = model(images)
    if scores.dim() == 3:
        return scores
    scores = scores.as_subclass(Tensor)  # as a Victim says how it is to be enlarged
    size = images.shape[2:]
    return nn.functional.interpolate(scores, size, mode="bilinear", align_corners=True)


def plain_loop(work: Work, max_iter: int, levels: bool) -> int:
    """Updates of Algorithm 1 as one would write it down, at 8 bits if asked for."""
    counted = work.labels != 255
    true, wanted = torch.where(counted, work.labels, 0), torch.where(counted, work.adversarial, 0)
    exact = work.image.clone()
    for update in range(max_iter + 1):
        x = ((exact * 255).round() / 255 if levels else exact).requires_grad_()
        scores = scores_at_targets(work.model, x)
        active = (scores.argmax(1) == true) & counted
        if update == max_iter or not active.any():
            break
        gain = scores.gather(1, wanted[:, None]) - scores.gather(1, true[:, None])
        (gradient,) = torch.autograd.grad((gain[:, 0] * active).sum(), x)
        exact = (exact.detach() + x.new_tensor(GAMMA) / gradient.abs().max() * gradient).clamp(0, 1)
    return update


def in_file(image: Tensor) -> Tensor:
    """An image (1, 3, H, W) as its file holds it: written and read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "attacked.png"
        files.write_image(path, image[0])
        return files.read_image(path)[None]


def right(model: Any, image: Tensor, work: Work) -> int:
    """Targets that a network sees as their label."""
    return int(DAG().count_active(model, image, work.labels, work.adversarial))


def outcome(options: argparse.Namespace) -> None:
    settings = {
        "float32": DAG(max_iter=options.max_iter),
        "256 levels": DAG(max_iter=options.max_iter, levels=256),
        f"256 levels, margin {options.margin:g}": DAG(
            max_iter=options.max_iter, levels=256, margin=options.margin
        ),
    }
    rows = []
    for work in works(options):
        others = [name for name in DEEPLABS if work.name in DEEPLABS and name != work.name]
        base = 0
        for kind, attack in settings.items():
            result = work.attack(attack)
            kept, updates = in_file(result.adversarial), int(result.iterations)
            base = base or updates
            count = int(result.targets)
            row = {
                "network": work.name,
                "photograph": f"{work.photograph}, {work.image.shape[3]} x {work.image.shape[2]}",
                "attack": kind,
                "targets": count,
                "ended": str(result.status[0]),
                "updates": updates,
                "of float32's": f"{updates / base:.2f}",
                "plain loop": "",
                "perceptibility": f"{float(result.perceptibility):.2e}",
                "right in the file": right(work.model, kept, work),
                "share": f"{100 * right(work.model, kept, work) / count:.1f} %",
                "at the other DeepLab": "",
            }
            if not attack.margin:
                row["plain loop"] = plain_loop(work, options.max_iter, attack.levels is not None)
            for name in others:
                share = right(load_network(name), kept, work) / count
                row["at the other DeepLab"] = f"{100 * share:.1f} %"
            rows.append(row)
            print(row, flush=True)
    note = "Targets that are right in the written file, of those that were attacked."
    save(options.save, "cpu", rows, rows, options.command, note)


def paper(options: argparse.Namespace) -> None:
    models = {name: load_network(name) for name in DEEPLABS}
    cases = [(photograph(name), annotated(name)) for name in PHOTOGRAPHS[DEEPLABS[0]]]
    generator = torch.Generator().manual_seed(0)
    aims = [assign("permutation", truth, 21, VOID, generator) for _, truth in cases]
    attack = DAG(gamma=GAMMA, max_iter=options.max_iter)
    kept = DAG(gamma=GAMMA, max_iter=options.max_iter, levels=256, margin=options.margin)
    kinds: dict[str, list[Tensor]] = {}
    made: dict[str, list[dagcore.Result]] = {}
    for name, model in models.items():
        for kind, rule in (("", attack), (f", 256 levels, margin {options.margin:g}", kept)):
            made[name + kind] = [
                rule(model, image, truth, aim)
                for (image, truth), aim in zip(cases, aims, strict=True)
            ]
    made["joint"] = [
        joint_attack(attack, [Part(model, truth, aim) for model in models.values()], image)
        for (image, truth), aim in zip(cases, aims, strict=True)
    ]
    kinds["none"] = [torch.zeros_like(image) for image, _ in cases]
    kinds |= {kind: [result.perturbation for result in of] for kind, of in made.items()}
    kinds["sum"] = [
        combine(*parts) for parts in zip(*(kinds[name] for name in DEEPLABS), strict=True)
    ]
    kinds["sum, permuted"] = [permute(r, generator) for r in kinds["sum"]]
    rows = []
    for kind, perturbations in kinds.items():
        row: dict[str, Any] = {"perturbation": kind, "updates": "", "perceptibility": ""}
        if kind in made:
            row["updates"] = ", ".join(str(int(one.iterations)) for one in made[kind])
            each = [f"{float(one.perceptibility):.2e}" for one in made[kind]]
            row["perceptibility"] = ", ".join(each)
        for name, model in models.items():
            row[name] = f"{score_left(model, cases, perturbations, 'levels' in kind):.1f}"
        rows.append(row)
        print(row, flush=True)
    note = (
        "Mean IoU, in percent, of the classes that the two annotated photographs have (background, "
        "bird, dog), under perturbations that were made for the network named; updates and "
        "perceptibility of each photograph."
    )
    save(options.save, "cpu", rows, rows, options.command, note)


def annotated(name: str) -> Tensor:
    """The classes of a photograph's pixels, (1, H, W)."""
    labels = files.read_label_map(REAL / "photos" / f"{name}.labels.png")[None]
    return torch.where(labels < 0, VOID, labels)


def score_left(
    model: nn.Module,
    cases: list[tuple[Tensor, Tensor]],
    perturbations: list[Tensor],
    in_8_bits: bool,
) -> float:
    """Mean IoU of the classes that the truth has."""
    measure, there = MeanIoU(21), set()
    for (image, truth), r in zip(cases, perturbations, strict=True):
        seen = (image + r).clamp(0, 1)
        with torch.no_grad():
            scores = scores_at_targets(model, in_file(seen) if in_8_bits else seen)
        measure.update(scores.argmax(1), truth)
        there |= set(truth.unique().tolist()) - {VOID}
    return statistics.fmean(measure.compute().per_class[k] for k in there)


def epsilon(options: argparse.Namespace) -> None:
    rows = []
    for work in works(options):
        for name, radius in RADII.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # 0.001 lets no image change
                attack = DAG(max_iter=options.updates, levels=256, epsilon=radius)
            result = work.attack(attack)
            change = float((in_file(result.adversarial) - work.image).abs().max())
            row = {
                "network": work.name,
                "photograph": work.photograph,
                "epsilon": name,
                "updates": int(result.iterations),
                "largest change": f"{change:.6f}",
                "in levels": round(255 * change),
                "within": "yes" if change <= radius + 1e-7 else "NO",
            }
            rows.append(row)
            print(row, flush=True)
    note = f"At most {options.updates} updates on 256 levels; the change is that in the file."
    save(options.save, "cpu", rows, rows, options.command, note)


def one_update(work: Work, levels: int | None) -> Callable[[], object]:
    """An update of an image that never finishes: a step too small to change anything."""
    attack = DAG(gamma=1e-12, max_iter=10**4, levels=levels)
    targets = Targets(work.labels, lambda *_: work.adversarial)
    slots = open_slots(attack, [attack.network(work.model)], work.image, [targets])

    def run() -> None:
        slots.iterate()
        assert not slots.finished()

    return run


def peer_updates(work: Work, updates: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """So many evaluations by adv-lib, and by an attack here: the runner-up rule on both sides."""
    scores_of, peer = full_size_aligned(work), adv_lib_dag()
    attack = DAG(max_iter=updates - 1)
    return (
        lambda: peer(scores_of, work.image, work.labels, max_iter=updates, γ=GAMMA),
        lambda: attack(work.model, work.image, work.labels, "runner-up"),
    )


def full_size_aligned(work: Work) -> Callable[[Tensor], Tensor]:
    """The network as adv-lib needs it."""
    return full_size(lambda x: scores_at_targets(work.model, x), work.labels)


def speed(options: argparse.Namespace) -> None:
    rows, record = [], []
    for work in works(options):
        work.model.requires_grad_(False)
        with freed_memory_kept():  # as attacks do
            times = alternate(
                {
                    "bare": bare_iteration(work.model, work.image),
                    "engine": one_update(work, None),
                    "bare again": bare_iteration(work.model, work.image),
                    "256 levels": one_update(work, 256),
                },
                options.rounds,
                warmup=2,
            )
        if work.name in DEEPLABS:
            peer, own = peer_updates(work, options.updates)
            whole = alternate({"adv-lib": peer, "here": own}, options.rounds, warmup=0)
            times |= {k: [s / options.updates for s in v] for k, v in whole.items()}
        row: dict[str, Any] = {"network": work.name, "photograph": work.photograph}
        row |= {f"{side} ms": spread(values, 1e3) for side, values in times.items()}
        middle = {side: statistics.median(values) for side, values in times.items()}
        base = statistics.median(times["bare"] + times["bare again"])
        for side in ("engine", "256 levels"):
            row[f"{side}, overhead"] = f"{100 * (middle[side] / base - 1):+.1f} %"
        row.setdefault("adv-lib ms", "")
        row.setdefault("here ms", "")
        row["adv-lib / here"] = (
            f"{middle['adv-lib'] / middle['here']:.2f}" if "adv-lib" in middle else ""
        )
        rows.append(row)
        record.append({**row, "seconds": times})
        print(row, flush=True)
    note = (
        "Medians (quartiles) of an update; bare is the network's forward pass and input gradient, "
        f"timed in alternation with the engine's. adv-lib and here: calls of {options.updates} "
        "evaluations by the runner-up rule, the time divided by these, in alternation too."
    )
    save(options.save, "cpu", rows, record, options.command, note)


def figure(options: argparse.Namespace) -> None:
    """One picture, a row a network, each made by `dagcore.evaluation.figures`."""
    from PIL import Image

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, photo in (("deeplab_voc", "chelsea"), ("nanodet_coco", "astronaut")):
            network = load_network(name)
            if name in DEEPLABS:
                network = victims.Victim(network, classes=real_networks().VOC)
            work = aimed(name, photo, network)
            result = work.attack(DAG(max_iter=options.max_iter, levels=256))
            kept, size = in_file(result.adversarial), (work.image.shape[2], work.image.shape[3])
            print(f"{name}, {photo}: {result}, right: {right(network, kept, work)}", flush=True)
            path = Path(folder) / f"{name}.png"
            attack_figure(
                path,
                image=work.image[0],
                adversarial=kept[0],
                predicted=predict(network, work.image[0], size),
                attacked=predict(network, kept[0], size),
                classes=network.classes,
                note=f"{name}: {result.status[0]} after {int(result.iterations)} updates, "
                f"{right(network, kept, work)} of {int(result.targets)} targets right in the file",
                least=0.35,
            )
            row = Image.open(path).convert("RGB")
            rows.append(row.resize((1400, round(row.height * 1400 / row.width))))
    page = Image.new("RGB", (1400, sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        page.paste(row, (0, top))
        top += row.height
    page.save(RESULTS / "real.jpg", quality=85, optimize=True)


ALMA_PHOTOGRAPHS = ("bird", "dog", "chelsea", "astronaut", "coffee", "rocket")
OWN_STEPS = {"adv-lib": 500, "here": 250, "here, prepared": 250}  # by default


def alma(options: argparse.Namespace) -> None:
    rows, record = [], []
    for name in chosen(DEEPLABS, options.networks):
        model = load_network(name).requires_grad_(False)
        fast = victims.prepare(model)
        for photo in chosen(ALMA_PHOTOGRAPHS, options.photographs):
            whole, side = photograph(photo), options.side
            image = nn.functional.interpolate(whole, (side, side), mode="bilinear", antialias=True)
            image = image.clamp(0, 1)
            with torch.no_grad():
                labels = scores_at_targets(model, image).argmax(1)
            work = Work(name, photo, model, image, labels, labels)
            found: dict[str, dict[str, float]] = {}
            for kind, attack in alma_sides(work, fast).items():
                attack(3)  # compiles, and settles
                began, busy = time.perf_counter(), time.process_time()
                adversarial = attack(options.steps or OWN_STEPS[kind])
                ended, done = time.perf_counter(), time.process_time()
                with torch.no_grad():
                    fooled = scores_at_targets(model, adversarial).argmax(1) != labels
                found[kind] = {
                    "largest change": 255 * float((adversarial - image).abs().max()),
                    "fooled": float(fooled.double().mean()),
                    "seconds": ended - began,
                    "processor seconds": done - busy,
                }
            row: dict[str, Any] = {"network": name, "photograph": photo}
            for kind, of in found.items():
                row[f"{kind}, of 255"] = f"{of['largest change']:.3f} ({100 * of['fooled']:.1f} %)"
            for kind, of in found.items():
                row[f"{kind} s"] = f"{of['seconds']:.1f} ({of['processor seconds']:.1f})"
            rows.append(row)
            record.append({**row, "found": found})
            print(row, flush=True)
    middle: dict[str, Any] = {"network": "median, sum of seconds", "photograph": ""}
    for kind in record[0]["found"]:
        of = [one["found"][kind] for one in record]
        middle[f"{kind}, of 255"] = f"{statistics.median(one['largest change'] for one in of):.3f}"
        wall, busy = (sum(one[k] for one in of) for k in ("seconds", "processor seconds"))
        middle[f"{kind} s"] = f"{wall:.1f} ({busy:.1f})"
    rows.append(middle)
    note = (
        f"{', '.join(f'{options.steps or n} steps {kind}' for kind, n in OWN_STEPS.items())}, at "
        f"{options.side} x {options.side} and the network's own labels: "
        "the largest change of a pixel, with the share of the targets that it fools, and seconds "
        "of the attack (of processor time). Sides of a row one after the other."
    )
    save(options.save, "cpu", rows, record, options.command, note)


def alma_sides(work: Work, fast: nn.Module) -> dict[str, Callable[[int], Tensor]]:
    """adv-lib's attack and the one here, by the number of steps; also on the prepared network."""
    adv_lib_dag()  # puts a plotting client into place that adv-lib does not need
    from adv_lib.attacks.segmentation.alma_prox import alma_prox

    def scores_of(images: Tensor) -> Tensor:
        return scores_at_targets(work.model, images)

    def here(model: nn.Module, steps: int) -> Tensor:
        attack = dagcore.ALMAProx(steps=steps)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of the prepared copy: it is told here
            return attack(model, work.image, work.labels).adversarial

    return {
        "adv-lib": lambda steps: alma_prox(scores_of, work.image, work.labels, num_steps=steps),
        "here": lambda steps: here(work.model, steps),
        "here, prepared": lambda steps: here(fast, steps),
    }


COMMANDS = {
    "outcome": outcome,
    "paper": paper,
    "epsilon": epsilon,
    "speed": speed,
    "alma": alma,
    "figure": figure,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--networks", nargs="*", choices=PHOTOGRAPHS)
    parser.add_argument(
        "--photographs", nargs="*", choices=sorted({p for v in PHOTOGRAPHS.values() for p in v})
    )
    parser.add_argument("--max-iter", type=int, default=200)
    parser.add_argument("--margin", type=float, default=1.0)
    parser.add_argument("--updates", type=int, default=20, help="of epsilon and of adv-lib")
    parser.add_argument("--steps", type=int, help="of alma, in place of each side's own")
    parser.add_argument("--side", type=int, default=256, help="of alma's images")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", help="name of the table in benchmarks/results")
    options = parser.parse_args()
    options.command = "python benchmarks/bench_real.py " + " ".join(sys.argv[1:])
    if not REAL.is_dir():
        raise SystemExit(f"{REAL} is not there")
    COMMANDS[options.what](options)


if __name__ == "__main__":
    main()
