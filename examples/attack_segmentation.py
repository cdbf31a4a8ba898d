"""Attack a segmentation network of torchvision, and keep the result as an 8-bit file.

python examples/attack_segmentation.py [--image photo.jpg] [--weights DEFAULT]
"""

import argparse

import numpy as np
import torch
from PIL import Image
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import dagcore

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet

parser = argparse.ArgumentParser()
parser.add_argument("--image", help="without one a scene is attacked")
parser.add_argument("--weights", help="DEFAULT downloads torchvision's; without, they are random")
parser.add_argument("--out", default="attacked.png")
parser.add_argument("--max-iter", type=int, default=200)
args = parser.parse_args()

images = dagcore.data.Scenes("07", "test", count=1)[0].image[None]
if args.image:
    pixels = torch.from_numpy(np.array(Image.open(args.image).convert("RGB")))
    images = pixels.permute(2, 0, 1)[None] / 255

network = lraspp_mobilenet_v3_large(weights=args.weights, weights_backbone=None, num_classes=21)
victim = dagcore.victims.Victim(network, mean=MEAN, std=STD).eval()
with torch.no_grad():
    scores = victim(images)["out"]
    if args.weights is None:  # balance random weights, which see one class everywhere
        network.classifier.high_classifier.bias -= scores.mean((0, 2, 3))
        scores -= scores.mean((0, 2, 3), keepdim=True)
attack = dagcore.DAG(max_iter=args.max_iter, levels=256)  # what is attacked is what the file holds
result = attack(victim, images, scores.argmax(1), "runner-up")
pixels = (result.adversarial[0] * 255).round().byte().permute(1, 2, 0)
Image.fromarray(pixels.numpy()).save(args.out)
print(f"{result}: {int(result.left)} of {int(result.targets)} pixels keep their class")
