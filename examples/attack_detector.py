"""Attack a detector of the zoo on a scene, and print what it finds before and afterwards.

python examples/attack_detector.py [--model FCOS-VGG]
"""

import argparse

import torch

import dagcore

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="FCOS-VGG", help="a detector, as for dagcore attack")
parser.add_argument("--max-iter", type=int, default=150)
args = parser.parse_args()


def found(images: torch.Tensor, least: float = 0.5) -> str:
    """The objects that the whole detector finds in one image, with their scores."""
    with torch.no_grad():
        (seen,) = victim.detect(images)
    pairs = zip(seen["labels"].tolist(), seen["scores"].tolist(), strict=True)
    names = [f"{victim.classes[label]} {score:.2f}" for label, score in pairs if score >= least]
    return ", ".join(names) or "nothing"


victim = dagcore.victims.load(args.model)
scene = dagcore.data.Scenes("07", "test", count=1)[0]
images = scene.image[None]
targets = victim.dense_targets(images, [scene], generator=torch.Generator().manual_seed(0))
attack = dagcore.DAG(max_iter=args.max_iter, levels=256)
result = attack(victim, images, targets.labels, targets.adversarial_labels, boxes=targets.boxes)
print(f"{result}: {int(result.left)} of {int(result.targets)} targets are left")
print("before:", found(images))
print("after: ", found(result.adversarial))
