"""Adversarial training steps with dagcore's inner attack, and with the same one in plain PyTorch.

    python benchmarks/bench_training.py [--networks FCN-VGG DL-VGG] [--save training-cpu]

Both sides take the same network in the same mode, a share of each batch attacked by PGD with a
random start, then one step of AdamW on the whole batch; in alternation. The plain side enlarges the
scores, takes the cross-entropy of `torch.nn.functional` and the gradient to the images alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
from common import alternate, save, spread
from torch import Tensor, nn
from torch.nn import functional as F

import dagcore
from dagcore import zoo
from dagcore.data import Scenes
from dagcore.defences.training import attacked

VOID = 255


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


def sides(name: str, o: argparse.Namespace) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    options = {} if "RN" in name else {"norm": True}
    network = zoo.build(name, num_classes=13, **options)
    network = network.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    scenes = list(Scenes("07", count=o.batch))
    images = torch.stack([one.image for one in scenes])
    labels = torch.stack([one.mask for one in scenes]).long()
    half = round(o.share * o.batch)
    attack = dagcore.PGD(epsilon=o.epsilon, alpha=o.alpha, steps=o.steps)

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def plain() -> None:
        made = plain_attack(network, images[:half], labels[:half], o)
        step(enlarged_loss(network, torch.cat([made, images[half:]]), labels))

    def here() -> None:
        mixed = attacked(attack, network, images, labels, share=o.share)
        network.train()
        step(dagcore.losses.cross_entropy(network(mixed), labels))

    return {
        "plain": plain,
        "here": here,
        "plain, attack alone": lambda: plain_attack(network, images[:half], labels[:half], o),
        "here, attack alone": lambda: attacked(
            attack, network, images[:half], labels[:half], share=1
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--networks", nargs="*", default=["FCN-Alex", "FCN-VGG", "DL-VGG", "DL-RN101"]
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--epsilon", type=float, default=4 / 255)
    parser.add_argument("--alpha", type=float, default=2 / 255)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", help="name of the table in benchmarks/results")
    o = parser.parse_args()
    command = "python benchmarks/bench_training.py " + " ".join(sys.argv[1:])
    rows, record = [], []
    for name in o.networks:
        times = alternate(sides(name, o), o.rounds, warmup=2)
        middle = {side: statistics.median(values) for side, values in times.items()}
        row = {"network": name, **{f"{side} ms": spread(v, 1e3) for side, v in times.items()}}
        row["step, plain / here"] = f"{middle['plain'] / middle['here']:.2f}"
        alone = middle["plain, attack alone"] / middle["here, attack alone"]
        row["attack, plain / here"] = f"{alone:.2f}"
        rows.append(row)
        record.append({**row, "seconds": times})
        print(row, flush=True)
    note = (
        f"A training step of {o.batch} scenes, of which a share of {o.share:g} is attacked by PGD "
        f"with {o.steps} steps."
    )
    save(o.save, "cpu", rows, record, command, note)


if __name__ == "__main__":
    main()
