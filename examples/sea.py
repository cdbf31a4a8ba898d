"""Evaluate a network by SEA's protocol: worst case over Auto-PGD on three losses.

python examples/sea.py --images 100 --out results

Replace `network` and `data` by your own. SEA makes 300 steps; fewer are for a quick look.
"""

import argparse
from dataclasses import replace

import dagcore
from dagcore.evaluation.protocols import PROTOCOLS

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--images", type=int, default=100)
parser.add_argument("--epsilon", type=float, default=4, help="radius, in levels of 8 bits")
parser.add_argument("--check", type=int, default=2, help="images to check the evaluation on")
parser.add_argument("--out", default="results")
args = parser.parse_args()

network = dagcore.victims.load("FCN-Alex")  # any callable from images in [0, 1] to scores
data = dagcore.data.Scenes("07", "test", count=args.images)  # or pairs (image, label map)

protocol = PROTOCOLS["sea-2024"]
if args.steps != 300:  # another protocol, so it needs another name
    attacks = [
        replace(one, settings={**one.settings, "steps": args.steps}) for one in protocol.attacks
    ]
    protocol = replace(protocol, name=f"sea-2024, {args.steps} steps", attacks=tuple(attacks))

summary = dagcore.evaluate(
    network, data, protocol, epsilon=args.epsilon / 255, check=args.check, out=args.out
)
print(f"clean: mIoU {summary['clean']['mIoU']:.1f} %")
for one in summary["worst_case"]:  # in memory, and in 8-bit files
    print(f"worst case, {one['stage']}: aAcc {one['aAcc']:.1f} %, mIoU {one['mIoU']:.1f} %")
print(f"see {args.out}/report.html")
