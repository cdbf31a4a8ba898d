"""Train a torchvision network on scenes against PGD, in a plain loop.

python examples/robust_training.py [STEPS]
"""

import sys

import torch
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import dagcore
from dagcore.data import SCENE_CLASSES, Scenes
from dagcore.defences.training import attacked


def train(steps: int, batch: int = 4) -> torch.nn.Module:
    """So many steps, half of each batch attacked at the network as it is."""
    torch.manual_seed(0)
    network = lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=len(SCENE_CLASSES))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    faster = dagcore.victims.prepare(network)  # attacked in its place, with its weights
    attack = dagcore.PGD(epsilon=4 / 255, alpha=2 / 255, steps=3)
    scenes = Scenes("07", "train", count=1000)
    for step in range(steps):
        chosen = [scenes[k] for k in torch.randint(len(scenes), (batch,)).tolist()]
        images = torch.stack([one.image for one in chosen])
        labels = torch.stack([one.mask for one in chosen])
        images = attacked(attack, faster, images, labels, share=0.5)
        network.train()
        loss = dagcore.losses.cross_entropy(network(images)["out"], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: loss {loss:.3f}")
    return network.eval()


if __name__ == "__main__":
    with dagcore.freed_memory_kept():  # faster on a CPU
        train(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
