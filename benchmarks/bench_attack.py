"""Whole iterations and whole attacks: the engine beside the bare network and beside its peers.

    python benchmarks/bench_attack.py iteration | preparation | convergence | memory | scaling

iteration    one update by the engine, against the bare network's forward pass and input gradient:
             as users run it, and with freed memory kept, as attacks keep it
preparation  forward pass and input gradient with each of `victims.prepare`'s options
convergence  photographs attacked until none of their targets is active (or at most a share of them,
             --tolerance: on random weights the last of them push each other back and forth),
             images per second, against the reference loop and the `dag` of adv-lib
             (pip install --no-deps adv-lib)
memory       peak memory beyond the process's before, engine against reference, each in a process
scaling      time of the seed ops against classes, image side, batch and threads, as a plot

Networks have real architectures; their weights are random, except for the demo's.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, alternate, chosen, photographs, save, seconds, spread
from networks import NETWORKS, segformer
from torch import Tensor, nn

import dagcore
from dagcore import DAG, victims
from dagcore.attacks.base import open_slots
from dagcore.engine import freed_memory_kept, read_scores
from dagcore.engine.networks import Targets

GAMMA = 0.5 / 255


def predictions(model: nn.Module, images: Tensor) -> Tensor:
    """The model's own labels, at the images' size, or at the score map's for the demo network."""
    with torch.no_grad():
        labels = []
        for image in images:
            scores = read_scores(model(image[None]), image[None])
            size = image.shape[1:] if scores.shape[1] < 1000 else scores.shape[2:]
            labels.append(dagcore.ops.argmax_bilinear(scores, tuple(size)))
    return torch.cat(labels)


def full_size(model: nn.Module, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """The model as a peer without low-resolution reading needs it."""

    def scores_of(images: Tensor) -> Tensor:
        scores = read_scores(model(images), images)
        if scores.shape[2:] == labels.shape[1:]:
            return scores
        return nn.functional.interpolate(scores, labels.shape[1:], mode="bilinear")

    return scores_of


def iteration(options: argparse.Namespace) -> None:
    rows, record = [], []
    for name in chosen(NETWORKS, options.networks):
        model = NETWORKS[name]().to(options.device)
        fast = victims.prepare(model)
        for batch in options.batches:
            images = photographs(batch, options.side, options.side).to(options.device)
            labels = predictions(model, images)
            as_is = {"as users run it": bare_iteration(model, images)}
            times = alternate(as_is, options.rounds, warmup=2, device=options.device)
            with freed_memory_kept():  # as attacks do
                times |= alternate(
                    {
                        "bare": bare_iteration(model, images),
                        "engine": engine_iteration(model, images, labels),
                        "bare again": bare_iteration(model, images),
                        "prepared": engine_iteration(fast, images, labels),
                    },
                    options.rounds,
                    warmup=2,
                    device=options.device,
                )
            own = statistics.median(times["bare"] + times["bare again"])
            row = {"network": name, "batch": batch, "side": options.side}
            for side, values in times.items():
                row[f"{side} ms"] = spread(values, 1e3)
            ratio = {side: statistics.median(values) / own for side, values in times.items()}
            row["overhead"] = f"{100 * (ratio['engine'] - 1):+.1f} %"
            row["prepared / bare"] = f"{ratio['prepared']:.2f}"
            row["as users run it / prepared"] = (
                f"{ratio['as users run it'] / ratio['prepared']:.2f}"
            )
            rows.append(row)
            record.append({**row, "seconds": times})
            print(row, flush=True)
    save(options.save, options.device, rows, record, options.command)


def preparation(options: argparse.Namespace) -> None:
    """Each option alone, then all of the default's together, then what may be added to it."""
    alone = {"low_resolution": False, "fold_batch_norm": False, "merge_linear": False}
    variants: dict[str, dict[str, Any]] = {
        "low resolution": alone | {"low_resolution": None, "channels_last": False},
        "folded": alone | {"fold_batch_norm": True, "channels_last": False},
        "merged": alone | {"merge_linear": True, "channels_last": False},
        "channels last": alone | {"channels_last": True},
        "default": {},
        "default, bf16": {"bf16": True},
        "default, compiled": {"compile": True},
    }
    rows, record = [], []
    for name in chosen(NETWORKS, options.networks):
        model = NETWORKS[name]().to(options.device)
        images = photographs(1, options.side, options.side).to(options.device)
        sides = {"bare": bare_iteration(model, images)}
        sides |= {
            variant: bare_iteration(victims.prepare(model, **settings), images)
            for variant, settings in variants.items()
        }
        with freed_memory_kept():
            times = alternate(sides, options.rounds, warmup=2, device=options.device)
        own = statistics.median(times["bare"])
        rows.append({"network": name, "bare ms": spread(times["bare"], 1e3)})
        rows[-1] |= {
            f"bare / {variant}": f"{own / statistics.median(times[variant]):.2f}"
            for variant in variants
        }
        record.append({"network": name, "seconds": times})
        print(rows[-1], flush=True)
    save(options.save, options.device, rows, record, options.command)


def bare_iteration(model: nn.Module, images: Tensor) -> Callable[[], object]:
    """Forward pass and input gradient, with a dense seed that is there already."""
    model.requires_grad_(False)
    seed = torch.randn_like(read_scores(model(images), images))

    def run() -> object:
        x = images.detach().requires_grad_()
        scores = read_scores(model(x), x)
        return torch.autograd.grad(scores, x, seed)

    return run


def engine_iteration(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], object]:
    """One update of images that never finish: a step too small to change anything."""
    attack = DAG(gamma=1e-12, max_iter=10**4)
    adversarial = (labels + 1) % (1000 if labels.shape[1] < images.shape[2] // 8 else 2)
    targets = Targets(labels, lambda *_: adversarial)
    slots = open_slots(attack, [attack.network(model)], images, [targets])

    def run() -> None:
        slots.iterate()
        assert not slots.finished()

    return run


def convergence(options: argparse.Namespace) -> None:
    rows, record = [], []
    for name in chosen(NETWORKS, options.networks):
        model = NETWORKS[name]().to(options.device).requires_grad_(False)
        images = photographs(options.images, options.side, options.side).to(options.device)
        labels = predictions(model, images)
        sides = attackers(model, images, labels, options)
        results: dict[str, Tensor] = {}
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(options.rounds):
            for side, run in sides.items():
                times[side].append(seconds(keeping(results, side, run), options.device))
                print(name, side, f"{times[side][-1]:.1f} s", flush=True)
        fastest_peer = statistics.median(times["adv-lib"])
        for side, adversarial in results.items():
            left = active_targets(model, adversarial, labels)
            done = int((left <= options.tolerance * labels[0].numel()).sum())
            row = {
                "network": name,
                "attack": side,
                "images": len(images),
                "done": done,
                "active targets": f"{int(left.sum())} of {labels.numel()}",
                "images/s": f"{len(images) / statistics.median(times[side]):.3f}",
                "seconds": spread(times[side]),
                "adv-lib / this": f"{fastest_peer / statistics.median(times[side]):.2f}",
                "perceptibility": f"{perceptibility(adversarial - images):.2e}",
            }
            rows.append(row)
            record.append({**row, "all seconds": times[side], "left": left.tolist()})
            print(row, flush=True)
    save(options.save, options.device, rows, record, options.command)


def keeping(results: dict[str, Tensor], side: str, run: Callable[[], Tensor]) -> Callable[[], None]:
    """A run whose result is kept under the side's name."""
    return lambda: results.update({side: run()})


def perceptibility(perturbation: Tensor) -> float:
    return float(dagcore.perturbation.perceptibility(perturbation).mean())


def active_targets(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Targets that the user's own network still sees as their label, in full resolution."""
    scores_of = full_size(model, labels)
    with torch.no_grad():
        predicted = torch.cat([scores_of(image[None]).argmax(1) for image in images])
    return (predicted == labels).flatten(1).sum(1)


def attackers(
    model: nn.Module, images: Tensor, labels: Tensor, options: argparse.Namespace
) -> dict[str, Callable[[], Tensor]]:
    """The same rule on all sides: the runner-up, until at most the tolerance is active.

    The budget is of updates in one precision: bf16 and float32 have one each.
    """
    settings: dict[str, Any] = {
        "gamma": GAMMA,
        "max_iter": options.max_iter,
        "tolerance": options.tolerance,
    }
    attack = dagcore.DAG(**settings)
    peer = adv_lib_dag()

    def in_batches(run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        pairs = zip(images.split(options.slots), labels.split(options.slots), strict=True)
        return torch.cat([run(*pair) for pair in pairs])

    def streamed(victim: nn.Module, begin: Tensor | None = None) -> Tensor:
        samples = (
            dagcore.Sample(image, of, "runner-up", start=None if begin is None else begin[k], key=k)
            for k, (image, of) in enumerate(zip(images, labels, strict=True))
        )
        found = torch.empty_like(images)
        for result in attack.stream(victim, samples, options.slots):
            found[result.key] = result.adversarial[0]
        return found

    def of_adv_lib(batch: Tensor, of: Tensor) -> Tensor:
        return peer(
            full_size(model, labels),
            batch,
            of,
            adv_threshold=1 - options.tolerance,
            max_iter=options.max_iter + 1,
            γ=GAMMA,
        )

    reference = dagcore.DAG(**settings, backend="reference")
    sides: dict[str, Callable[[], Tensor]] = {
        "adv-lib": lambda: in_batches(of_adv_lib),
        "stream": lambda: streamed(model),
        "stream, prepared": lambda: streamed(victims.prepare(model)),
    }
    if options.bf16:
        # What bfloat16 takes for a success float32 may not: the few that are left go on in float32.
        sides["stream, bf16, then float32"] = lambda: streamed(
            victims.prepare(model), begin=streamed(victims.prepare(model, bf16=True))
        )
    if options.reference:
        sides["reference"] = lambda: in_batches(
            lambda batch, of: (
                reference(full_size(model, labels), batch, of, "runner-up").adversarial
            )
        )
    return sides


def adv_lib_dag() -> Callable[..., Tensor]:
    """adv-lib's attack, as it is; it imports a plotting client that it does not need here."""
    stand_in = types.ModuleType("visdom")
    stand_in.Visdom = object  # type: ignore[attr-defined]
    sys.modules.setdefault("visdom", stand_in)
    from adv_lib.attacks.segmentation.dense_adversary import dag

    run: Callable[..., Tensor] = dag
    return run


def memory(options: argparse.Namespace) -> None:
    rows = []
    for classes in (21, 150):
        peaks = {
            side: [peak_of(side, classes, options) for _ in range(options.rounds)]
            for side in ("network", "engine", "engine, freed memory kept", "reference")
        }
        middle = {side: statistics.median(values) for side, values in peaks.items()}
        beyond = {side: middle[side] - middle["network"] for side in ("engine", "reference")}
        rows.append(
            {
                "classes": classes,
                "side": options.side,
                **{f"{side} MiB": f"{value:.0f}" for side, value in middle.items()},
                "engine beyond network": f"{beyond['engine']:.0f}",
                "reference beyond network": f"{beyond['reference']:.0f}",
                "ratio": f"{beyond['engine'] / beyond['reference']:.3f}",
            }
        )
        print(rows[-1], flush=True)
    save(options.save, options.device, rows, rows, options.command)


def peak_of(side: str, classes: int, options: argparse.Namespace) -> float:
    """Peak MiB of a process of its own, beyond what it held before the first iteration."""
    command = [sys.executable, __file__, "memory", "--child", side, str(classes)]
    command += ["--side", str(options.side), "--device", options.device]
    # What is freed goes back at once, so that a peak is what was in use.
    tight = {} if "kept" in side else {"MALLOC_MMAP_THRESHOLD_": "131072"}
    environment = {**os.environ, **tight}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    out = done.stdout
    return float(json.loads(out.splitlines()[-1])["peak"])


def memory_child(side: str, classes: int, options: argparse.Namespace) -> None:
    model = segformer(classes).to(options.device)
    images = photographs(1, options.side, options.side).to(options.device)
    labels = torch.zeros((1, options.side, options.side), dtype=torch.uint8, device=options.device)
    adversarial = torch.ones_like(labels)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = current_bytes()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    if side == "network":
        run = bare_iteration(model, images)
        for _ in range(3):
            run()
    else:
        backend = "native" if side.startswith("engine") else "reference"
        dagcore.DAG(max_iter=2, backend=backend)(model, images, labels, adversarial)
    peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else peak_bytes()
    print(json.dumps({"peak": (peak - before) / 2**20}))


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def current_bytes() -> int:
    return status_bytes("VmRSS")


def peak_bytes() -> int:
    return max(status_bytes("VmHWM"), 0) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def scaling(options: argparse.Namespace) -> None:
    """Seed ops at 1 x 21 x 512 x 512, one dimension at a time varied."""
    cases: dict[str, list[dict[str, int]]] = {
        "classes": [{"classes": c} for c in (2, 5, 10, 21, 50, 100, 150, 300)],
        "side": [{"side": s} for s in (64, 128, 256, 512, 1024)],
        "batch": [{"batch": b} for b in (1, 2, 4, 8)],
        "threads": [{"threads": t} for t in range(1, torch.get_num_threads() + 1)],
    }
    rows, record = [], []
    for axis, settings in cases.items():
        for setting in settings:
            times = scaled(**setting, rounds=options.rounds, device=options.device)
            row = {axis: setting[axis]}
            rows.append(
                {"axis": axis, "value": row[axis], **{k: spread(v, 1e3) for k, v in times.items()}}
            )
            record.append({"axis": axis, "value": row[axis], "seconds": times})
            print(rows[-1], flush=True)
    save(options.save, options.device, rows, record, options.command)
    if options.save:
        plot(record, RESULTS / f"{options.save}.png")


def scaled(
    *,
    classes: int = 21,
    side: int = 512,
    batch: int = 1,
    threads: int | None = None,
    rounds: int,
    device: str,
) -> dict[str, list[float]]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(batch, classes, side // 64 + 1, side // 64 + 1, generator=generator)
    low = nn.functional.interpolate(coarse, (side // 8, side // 8), mode="bicubic").to(device)
    high = nn.functional.interpolate(low, (side, side), mode="bilinear")
    labels = high.argmax(1).to(torch.int32)
    other = (labels + 1) % classes
    ops, reference = dagcore.ops, dagcore.reference
    try:
        return alternate(
            {
                "dag_seed ms": lambda: ops.dag_seed(high, labels, other),
                "its reference ms": lambda: reference.dag_seed(high, labels, other),
                "dag_seed_bilinear ms": lambda: ops.dag_seed_bilinear(low, labels, other),
                "its reference (bilinear) ms": lambda: reference.dag_seed_bilinear(
                    low, labels, other
                ),
            },
            rounds,
            device=device,
        )
    finally:
        torch.set_num_threads(before)


def plot(record: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    axes_names = list(dict.fromkeys(row["axis"] for row in record))
    figure = Figure(figsize=(4 * len(axes_names), 3.6), layout="constrained")
    for panel, name in zip(figure.subplots(1, len(axes_names)), axes_names, strict=True):
        points = [row for row in record if row["axis"] == name]
        for side in points[0]["seconds"]:
            values = [1e3 * statistics.median(row["seconds"][side]) for row in points]
            panel.plot([row["value"] for row in points], values, marker="o", label=side[:-3])
        panel.set(xlabel=name, ylabel="ms", xscale="log", yscale="log")
        panel.set_xticks([row["value"] for row in points], [str(row["value"]) for row in points])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "iteration": iteration,
    "preparation": preparation,
    "convergence": convergence,
    "memory": memory,
    "scaling": scaling,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--networks", nargs="*", choices=NETWORKS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--max-iter", type=int, default=200)
    parser.add_argument("--tolerance", type=float, default=0.0, help="share of active targets")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="also with bf16 autocast")
    parser.add_argument("--reference", action="store_true", help="also the reference loop")
    parser.add_argument("--save", help="name of the table in benchmarks/results")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.command = "python benchmarks/bench_attack.py " + " ".join(sys.argv[1:])
    return options


def main() -> None:
    options = arguments()
    if options.child:
        memory_child(options.child[0], int(options.child[1]), options)
    else:
        COMMANDS[options.what](options)


if __name__ == "__main__":
    main()
