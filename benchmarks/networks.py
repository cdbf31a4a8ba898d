"""The networks of the benchmarks: real architectures, with weights as `NETWORKS` says.

python benchmarks/networks.py      trains `trained_deeplab`, once; it is kept in benchmarks/cache
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from common import calibrate, photographs
from safetensors.torch import load_file, save_file
from torch import nn

from dagcore import victims

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def torchvision_network(name: str, classes: int = 21) -> nn.Module:
    from torchvision.models import segmentation

    torch.manual_seed(0)
    network = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=classes)
    return calibrate(victims.Victim(network, mean=MEAN, std=STD), photographs(4, 256, 256))


def segformer(classes: int = 150) -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(0)
    network = SegformerForSemanticSegmentation(SegformerConfig(num_labels=classes))
    return calibrate(victims.Victim(network, mean=MEAN, std=STD), photographs(4, 256, 256))


CACHE = Path(__file__).with_name("cache") / "deeplabv3_mobilenet_v3_large.safetensors"
SIDE, BATCH, STEPS = 160, 8, 1000


def trained_deeplab() -> nn.Module:
    """torchvision's deeplabv3_mobilenet_v3_large, trained on scenes from scratch.

    Attacks on random weights need not end: their scores differ by so little that pixels which
    share a low-resolution cell push each other back and forth.
    """
    from torchvision.models import segmentation

    from dagcore.data import SCENE_CLASSES

    torch.manual_seed(0)
    network = segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=len(SCENE_CLASSES)
    )
    if not CACHE.exists():
        train(network)
        CACHE.parent.mkdir(exist_ok=True)
        save_file(network.state_dict(), CACHE)
    network.load_state_dict(load_file(CACHE))
    return victims.Victim(network, mean=MEAN, std=STD, classes=SCENE_CLASSES).eval()


def train(network: nn.Module) -> None:
    from dagcore.data import Scenes

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    scenes = Scenes(count=BATCH * STEPS, size=(SIDE, SIDE), seed=1)
    loader = torch.utils.data.DataLoader(
        scenes, batch_size=BATCH, collate_fn=lambda batch: batch, drop_last=True
    )
    network.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS)
    for step, batch in enumerate(loader):
        images = torch.stack([(scene.image - mean) / std for scene in batch])
        masks = torch.stack([scene.mask for scene in batch])
        scores = network(images.contiguous(memory_format=torch.channels_last))["out"]
        loss = nn.functional.cross_entropy(scores, masks.long(), ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"training deeplabv3: step {step} of {STEPS}, loss {loss:.3f}", flush=True)
    network.eval().to(memory_format=torch.contiguous_format)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "deeplabv3_mobilenet_v3_large": lambda: torchvision_network("deeplabv3_mobilenet_v3_large"),
    "fcn_resnet50": lambda: torchvision_network("fcn_resnet50"),
    "segformer_b0": segformer,
    "demo": lambda: victims.load("demo").eval(),
    "trained_deeplab": trained_deeplab,
}

if __name__ == "__main__":
    trained_deeplab()
