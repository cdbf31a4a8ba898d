"""Adversarial training steps with dagcore's inner attack, and with the same one in plain PyTorch.

    python benchmarks/bench_training.py [--networks FCN-VGG DL-VGG] [--save training-cpu]

All sides take the same network in the same mode, a share of each batch attacked by PGD with a
random start, then one step of AdamW on the whole batch. The plain side enlarges the scores, takes
the cross-entropy of `torch.nn.functional` and the gradient to the images alone. Ours attacks a
prepared copy, which takes over the network's weights before each attack, in float32 or bfloat16,
and trains in a block of `dagcore.freed_memory_kept`. Sides alternate in blocks of a few steps.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from common import save, seconds, spread
from torch import Tensor, nn
from torch.nn import functional as F

import dagcore
from dagcore import victims, zoo
from dagcore.data import Scenes
from dagcore.defences.training import attacked

VOID = 255
Loop = tuple[Callable[[], object], Callable[[], AbstractContextManager[None]]]


def enlarged_loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    scores = F.interpolate(network(images), labels.shape[1:], mode="bilinear")
    return F.cross_entropy(scores, labels, ignore_index=VOID)


def plain_attack(
    network: nn.Module, images: Tensor, labels: Tensor, o: argparse.Namespace
) -> Tensor:
    """PGD as one writes it down."""
    network.eval()
    delta = torch.empty_like(images).uniform_(-o.epsilon, o.epsilon)
    for _ in range(o.steps):
        delta.requires_grad_()
        loss = enlarged_loss(network, (images + delta).clamp(0, 1), labels)
        (gradient,) = torch.autograd.grad(loss, delta)
        delta = (delta.detach() + o.alpha * gradient.sign()).clamp(-o.epsilon, o.epsilon)
    network.train()
    return (images + delta).clamp(0, 1).detach()


def sides(name: str, o: argparse.Namespace) -> dict[str, Loop]:
    torch.manual_seed(0)
    options = {} if "RN" in name else {"norm": True}
    network = zoo.build(name, num_classes=13, **options)
    network = network.to(memory_format=torch.channels_last).train()
    copies = {"here": victims.prepare(network), "here, bf16": victims.prepare(network, bf16=True)}
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    scenes = list(Scenes("07", count=o.batch))
    images = torch.stack([one.image for one in scenes])
    labels = torch.stack([one.mask for one in scenes]).long()
    first = round(o.share * o.batch)
    attack = dagcore.PGD(epsilon=o.epsilon, alpha=o.alpha, steps=o.steps)

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def plain() -> None:
        made = plain_attack(network, images[:first], labels[:first], o)
        step(enlarged_loss(network, torch.cat([made, images[first:]]), labels))

    def ours(copy: nn.Module) -> Callable[[], None]:
        def here() -> None:
            mixed = attacked(attack, copy, images, labels, share=o.share)
            step(dagcore.losses.cross_entropy(network(mixed), labels))

        return here

    kept = {side: (ours(copy), dagcore.freed_memory_kept) for side, copy in copies.items()}
    return {"plain": (plain, contextlib.nullcontext), **kept}


def alternate(loops: dict[str, Loop], rounds: int, block: int) -> dict[str, list[float]]:
    """Seconds of the steps of each side, in blocks whose first step does not count."""
    times: dict[str, list[float]] = {side: [] for side in loops}
    for _ in range(rounds):
        for side, (step, around) in loops.items():
            with around():
                step()
                times[side] += [seconds(step) for _ in range(block)]
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--networks", nargs="*", default=["FCN-Alex", "FCN-VGG", "DL-VGG", "DL-RN101"]
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--steps", type=int, nargs="*", default=[3, 7], help="of PGD")
    parser.add_argument("--epsilon", type=float, default=4 / 255)
    parser.add_argument("--alpha", type=float, default=2 / 255)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--block", type=int, default=4, help="training steps of a side in a row")
    parser.add_argument("--save", help="name of the table in benchmarks/results")
    o = parser.parse_args()
    command = "python benchmarks/bench_training.py " + " ".join(sys.argv[1:])
    rows, record = [], []
    for name in o.networks:
        for steps in o.steps:
            own = argparse.Namespace(**{**vars(o), "steps": steps})
            times = alternate(sides(name, own), o.rounds, o.block)
            middle = {side: statistics.median(values) for side, values in times.items()}
            row = {"network": name, "PGD steps": steps}
            row |= {f"{side}, ms": spread(values, 1e3) for side, values in times.items()}
            for side in ("here", "here, bf16"):
                row[f"plain / {side}"] = f"{middle['plain'] / middle[side]:.2f}"
            rows.append(row)
            record.append({**row, "seconds": times})
            print(row, flush=True)
    note = (
        f"A training step of {o.batch} scenes, of which a share of {o.share:g} is attacked by PGD; "
        f"medians (quartiles) of {o.rounds * o.block} steps, the sides in alternating blocks."
    )
    save(o.save, "cpu", rows, record, command, note)


if __name__ == "__main__":
    main()
