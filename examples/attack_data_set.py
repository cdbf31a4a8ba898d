"""Attack the images of a folder, several at a time, into 8-bit files.

python examples/attack_data_set.py FCN-VGG photos maps attacked

The values of maps/NAME.png are the classes of photos/NAME.png, 255 where there is none.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import dagcore

parser = argparse.ArgumentParser()
parser.add_argument("model", help="as for dagcore attack --model")
parser.add_argument("folders", nargs=3, type=Path, metavar="FOLDER")
parser.add_argument("--max-iter", type=int, default=200)
parser.add_argument("--slots", type=int, default=4)
args = parser.parse_args()
photos, maps, out = args.folders
out.mkdir(exist_ok=True)


def samples():
    """Images with their labels, read by a thread while others are attacked."""
    for path in sorted(photos.glob("*.png")):
        pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
        labels = torch.from_numpy(np.array(Image.open(maps / path.name)))
        yield dagcore.Sample(pixels.permute(2, 0, 1) / 255, labels, key=path.name)


network = dagcore.victims.load(args.model)
attack = dagcore.DAG(max_iter=args.max_iter, levels=256)
for result in attack.stream(dagcore.victims.prepare(network), samples(), slots=args.slots):
    pixels = (result.adversarial[0] * 255).round().byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(out / result.key)
    print(f"{result.key}: {result.status[0]}, {int(result.left)} of {int(result.targets)} left")
