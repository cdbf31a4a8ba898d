"""Attacks on detectors: what sending back less saves, and how much memory an update takes.

    python benchmarks/bench_detection.py attack | memory

attack  whole attacks on test scenes: all boxes sent back through the head, active ones only, boxes
        of the same cells read once, both (the default, but R-FCN's: distinct only), and with the
        detector prepared
memory  peak memory of a process that makes one update of torchvision's fasterrcnn_resnet50_fpn
        (random weights) with 3000 active boxes in an image of 600x800 pixels
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from common import alternate, photographs, save, spread

import dagcore
from dagcore import victims, zoo
from dagcore.data import Scenes

SIDES: dict[str, dict[str, bool]] = {
    "all": {"active_only": False, "distinct": False},
    "active only": {"active_only": True, "distinct": False},
    "distinct only": {"active_only": False, "distinct": True},
    "both": {"active_only": True, "distinct": True},
}


def attack(options: argparse.Namespace) -> None:
    scenes = list(Scenes("07", "test", count=options.images))
    images = torch.stack([scene.image for scene in scenes]).to(options.device)
    dag = dagcore.DAG(max_iter=150)
    rows, record = [], []
    for name in options.networks:
        network = zoo.load(name, device=options.device)
        sides = {side: victims.detector(network, **given) for side, given in SIDES.items()}
        for side in ("all", "both"):
            sides[f"{side}, prepared"] = victims.prepare(sides[side])
        aims = [
            sides["all"].dense_targets(
                images[k : k + 4], scenes[k : k + 4], generator=torch.Generator().manual_seed(k)
            )
            for k in range(0, len(images), 4)
        ]

        def run(victim: Any, aims: list[Any] = aims) -> Callable[[], object]:
            def whole() -> list[dagcore.Result]:
                return [
                    dag(
                        victim,
                        images[4 * k :][:4],
                        aim.labels,
                        aim.adversarial_labels,
                        boxes=aim.boxes,
                    )
                    for k, aim in enumerate(aims)
                ]

            return whole

        ended = {
            side: sum(int(r.converged.sum()) for r in run(victim)())
            for side, victim in sides.items()
        }
        times = alternate(
            {side: run(victim) for side, victim in sides.items()},
            options.rounds,
            warmup=0,
            device=options.device,
        )
        base = statistics.median(times["all"])
        for side, found in times.items():
            gain = base / statistics.median(found)
            rows.append(
                {
                    "network": name,
                    "side": side,
                    "s": spread(found),
                    "times as fast": f"{gain:.2f}",
                    "converged": f"{ended[side]} of {len(images)}",
                }
            )
            record.append({"network": name, "side": side, "seconds": found, "gain": gain})
    save(options.save, options.device, rows, record, "python benchmarks/bench_detection.py attack")


def measure(sides: str) -> None:
    """Peak memory of one update in MiB, printed as JSON."""
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    torch.manual_seed(0)
    network = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, min_size=600)
    victim = victims.detector(network.eval(), **SIDES[sides])
    image = photographs(1, 600, 800)
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(1, 3000, 2, generator=generator) * torch.tensor([500.0, 300.0])
    boxes = torch.cat([corner, corner + 50 + 250 * torch.rand(1, 3000, 2, generator=generator)], 2)
    labels = victim(image, boxes).argmax(1)  # all of them active
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dagcore.DAG(max_iter=1)(victim, image, labels, "runner-up", boxes=boxes)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"before": before / 1024, "peak": after / 1024}))


def memory(options: argparse.Namespace) -> None:
    rows, record = [], []
    for side in ("all", "active only"):
        script = [sys.executable, __file__, "measure", "--side", side]
        found = json.loads(subprocess.run(script, check=True, capture_output=True).stdout)
        rows.append({"side": side, "peak of the process, MiB": f"{found['peak']:.0f}"})
        record.append({"side": side, **found})
    save(options.save, "cpu", rows, record, "python benchmarks/bench_detection.py memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("attack", "memory", "measure"))
    parser.add_argument("--networks", nargs="*", default=["FR-VGG-0712", "R-FCN-RN50"])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--side", default="both")
    parser.add_argument("--save")
    options = parser.parse_args()
    if options.what == "measure":
        measure(options.side)
    else:
        {"attack": attack, "memory": memory}[options.what](options)


if __name__ == "__main__":
    main()
