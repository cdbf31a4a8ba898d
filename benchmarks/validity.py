"""The figures of docs/validity.md: every check on every segmentation network of the zoo.

python benchmarks/validity.py [--networks FCN-VGG] [--levels 1 4 8] [--alpha 0.01]

The attack is the default, or with --alpha PGD on the cross-entropy, 20 steps of that length.
"""

from __future__ import annotations

import argparse

from dagcore import PGD, zoo
from dagcore.data import Scenes
from dagcore.evaluation.validity import check

NETWORKS = [entry.name for entry in zoo.ENTRIES if entry.task == "segmentation"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--levels", type=int, nargs="*", default=[1, 4, 8], help="epsilon * 255")
    parser.add_argument("--alpha", type=float)
    o = parser.parse_args()
    attack = None if o.alpha is None else PGD(alpha=o.alpha, steps=20)
    scenes = list(Scenes("07", "test", count=2))
    images, labels = [one.image for one in scenes], [one.mask for one in scenes]
    for name in o.networks:
        surrogate = zoo.load("FCN-VGG*" if name == "FCN-VGG" else "FCN-VGG")
        for levels in o.levels:
            found = check(
                zoo.load(name),
                images,
                labels,
                attack=attack,
                epsilon=levels / 255,
                surrogate=surrogate,
            )
            for one in found:
                print(name, levels, one.name, one.verdict, one.figures, flush=True)


if __name__ == "__main__":
    main()
