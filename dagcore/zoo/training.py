"""Training the zoo's networks on scenes from scratch: seeded, resumable, the same again.

What a step does depends on the seed, the number of the step and the weights alone, so a training
that was interrupted goes on from its last checkpoint and ends with the same weights, bit by bit,
as long as machine, versions and threads stay the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset

from .. import checks
from ..data import SCENE_CLASSES, Example, Scenes
from ..data.scenes import VOID
from ..errors import ArgumentError
from ..files import atomic_write
from ..info import versions
from ..seeds import seed_of
from .backbones import fold
from .checkpoint import save_weights
from .evaluation import evaluate
from .registry import Entry, build, find, load

# The paper's names for this project's own sets: how many scenes of which family. What VOC 2012
# and SBD add in the paper, scenes of the other family do here.
TRAINING_SETS = {"07": {"07": 2000}, "07+12": {"07": 2000, "12": 4000}}
# Where torchvision's mini-batches are made for images of 600 pixels and more objects.
DETECTION_OPTIONS = {
    "rpn_batch_size_per_image": 32,
    "rpn_post_nms_top_n_train": 300,
    "box_batch_size_per_image": 64,
    "box_positive_fraction": 0.5,
}
LOG_STEPS = 50


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an architecture is trained."""

    samples: int
    """Images to see, repeats counted."""
    batch: int = 8
    learning_rate: float = 2e-3
    """At its peak: it rises linearly for a short while and falls as a cosine to 0."""
    weight_decay: float = 0.02
    dropout: float = 0.0
    """Half of a narrow fc6 is too little: the papers' 0.5 is for 4096 channels."""
    zoom: tuple[float, float] = (0.85, 1.2)


RECIPES = {
    "fcn-alex": Recipe(75_000),
    "fcn-vgg": Recipe(50_000),
    "dl-vgg": Recipe(50_000),
    "dl-rn101": Recipe(90_000),
    "fr-zf": Recipe(60_000),
    "fr-vgg": Recipe(36_000),
    "r-fcn-rn50": Recipe(50_000),
    "r-fcn-rn101": Recipe(45_000),
    "fcos-vgg": Recipe(50_000),
}


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a training stands after a step."""

    name: str
    samples: int
    total: int
    loss: float


def seed_of_name(name: str) -> int:
    """The seed of a network's training: made from its name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def train(
    name: str,
    *,
    out: str | Path = "zoo",
    seed: int | None = None,
    samples: int | None = None,
    width: float | None = None,
    device: str | torch.device = "cpu",
    checkpoint_steps: int = 500,
    test_scenes: int = 200,
    callback: Callable[[Progress], None] | None = None,
) -> Path:
    """Train a network, or go on where its training stopped, and measure it on unseen scenes.

    The folder gets NAME.pt (the checkpoint), NAME.jsonl and NAME.png (the losses) and at the end
    NAME.safetensors: batch norms of plain networks folded, rounded to float16, with a score that
    was measured on the rounded weights.

    Args:
        name: as in the paper's tables, such as "FCN-VGG*".
        out: the folder, made where it is missing.
        seed: of weights, order and augmentation; `seed_of_name` if None.
        samples: images to see, repeats counted, rounded up to whole batches; as in `RECIPES` if
            None.
        width: multiplies the channels; the shipped network's if None.
        device: where to train.
        checkpoint_steps: steps from one checkpoint to the next.
        test_scenes: number of scenes for the score.
        callback: told of every step.

    Returns:
        The path of the weights.

    Raises:
        ValueError: an unknown name, a number out of range, or a folder with another training's
            checkpoint.
    """
    entry = find(name)
    recipe = RECIPES[entry.architecture]
    seed = seed_of_name(entry.name) if seed is None else seed
    samples = recipe.samples if samples is None else samples
    checks.integer("seed", seed, at_least=0)
    checks.integer("samples", samples, at_least=1)
    checks.integer("checkpoint_steps", checkpoint_steps, at_least=1)
    checks.integer("test_scenes", test_scenes, at_least=1)
    recipe = dataclasses.replace(recipe, samples=samples)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    where = torch.device(device)
    devices = [] if where.type == "cpu" else [where]
    with torch.random.fork_rng(devices, device_type=where.type):  # leaves the caller's as they were
        training = Training(
            entry, recipe, seed=seed, width=entry.width if width is None else width, device=device
        )
        training.restore(folder / f"{entry.slug}.pt")
        while training.step < training.steps:
            loss = training.advance()
            if training.step % checkpoint_steps == 0 or training.step == training.steps:
                training.save(folder)
            if callback is not None:
                seen, total = (k * recipe.batch for k in (training.step, training.steps))
                callback(Progress(entry.name, seen, total, loss))
        return finish(training, folder / f"{entry.slug}.safetensors", test_scenes)


def finish(training: Training, path: Path, test_scenes: int) -> Path:
    """Write the weights of a training that is over, with their score."""
    entry = training.entry
    metadata = {
        "width": training.width,
        "classes": list(SCENE_CLASSES),
        "training_set": entry.training_set,
        "seed": training.seed,
        "samples": training.recipe.samples,
        "versions": {key: versions()[key] for key in ("dagcore", "torch", "numpy")},
    }
    save_weights(path, fold(training.network), metadata)
    network = load(entry.name, path, device=training.device)
    scenes = Scenes("07", "test", count=test_scenes)
    protocols = {"score": "voc2007", "coco": "coco"}
    for key in ("score", "coco") if entry.task == "detection" else ("score",):
        score = evaluate(network, scenes, protocol=protocols[key]).mean
        metadata[key] = None if math.isnan(score) else round(score, 2)
    save_weights(path, network, {**metadata, "test_scenes": test_scenes})
    return path


class Training:
    """A network on its way: all that a checkpoint holds."""

    def __init__(
        self, entry: Entry, recipe: Recipe, *, seed: int, width: float, device: str | torch.device
    ) -> None:
        self.entry, self.recipe, self.seed, self.width = entry, recipe, seed, width
        self.device = torch.device(device)
        self.step, self.steps = 0, -(-recipe.samples // recipe.batch)
        self.losses: dict[str, list[float]] = {}
        self.scenes = Pictures(TRAINING_SETS[entry.training_set])
        options: dict[str, Any] = dict(DETECTION_OPTIONS) if entry.two_stage else {}
        if "rn" not in entry.architecture:
            options["norm"] = True
            if entry.architecture != "fcos-vgg":
                options["dropout"] = recipe.dropout
        self.draw(0)
        network = build(entry.name, num_classes=len(SCENE_CLASSES), width=width, **options)
        # A fifth to a half faster on CPUs.
        self.network = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        parameters = list(self.network.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.dim() > 1]},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )

    def draw(self, *purpose: int) -> None:
        """Seed torch's generators for one purpose: 0, the weights; 1, epoch k; 2, step k."""
        torch.manual_seed(seed_of(self.seed, *purpose, bits=32))

    def chosen(self) -> list[int]:
        """The scenes of the next step: every epoch has all of them, in an order of its own."""
        first = self.step * self.recipe.batch
        numbers = range(first, first + self.recipe.batch)
        orders = {}
        for epoch in {number // len(self.scenes) for number in numbers}:
            self.draw(1, epoch)
            orders[epoch] = torch.randperm(len(self.scenes)).tolist()
        return [orders[number // len(self.scenes)][number % len(self.scenes)] for number in numbers]

    def advance(self) -> float:
        """One step; its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * rate(self.step, self.steps)
        batch = self.scenes.batch(self.chosen())
        self.draw(2, self.step)
        self.network.train()
        losses = self.losses_of(augment(batch, self.recipe.zoom))
        total = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        self.optimizer.step()
        for key, value in {**losses, "loss": total}.items():
            self.losses.setdefault(key, []).append(float(value.detach()))
        self.step += 1
        return self.losses["loss"][-1]

    def losses_of(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of a batch, by name."""
        images = batch.images.to(self.device)
        if self.entry.task == "detection":
            truth = [
                {"boxes": boxes.to(self.device), "labels": labels.to(self.device)}
                for boxes, labels in zip(batch.boxes, batch.labels, strict=True)
            ]
            losses: dict[str, Tensor] = self.network(list(images), truth)
            return losses
        size = images.shape[-2:]
        scores = F.interpolate(self.network(images), size, mode="bilinear", align_corners=False)
        masks = batch.masks.to(self.device)
        return {"cross_entropy": F.cross_entropy(scores, masks, ignore_index=VOID)}

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be gone on from."""
        recipe = {key: str(value) for key, value in dataclasses.asdict(self.recipe).items()}
        return {"name": self.entry.name, "seed": self.seed, "width": self.width, **recipe}

    def save(self, folder: Path) -> None:
        """Write the checkpoint, the losses and their curves, each whole or not at all."""
        from .curves import draw_losses

        state = {
            "settings": self.settings,
            "step": self.step,
            "losses": self.losses,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        stem = folder / self.entry.slug
        with atomic_write(stem.with_name(f"{stem.name}.jsonl")) as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in self.log()))
        draw_losses(stem.with_name(f"{stem.name}.png"), self.entry.name, list(self.log()))
        with atomic_write(stem.with_name(f"{stem.name}.pt")) as path:
            torch.save(state, path)

    def log(self) -> Iterator[dict[str, float]]:
        """Means of the losses over some steps at a time."""
        for first in range(0, self.step, LOG_STEPS):
            last = min(first + LOG_STEPS, self.step)
            means = {key: sum(v[first:last]) / (last - first) for key, v in self.losses.items()}
            yield {"samples": last * self.recipe.batch, **means}

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint, where there is one."""
        if not path.is_file():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            settings = state["settings"]
        except Exception as error:  # bytes that are no checkpoint fail in any way at all
            raise ArgumentError(f"checkpoint {path} cannot be read: {error}") from error
        wanted = self.settings
        other = {key: settings.get(key) for key in wanted if settings.get(key) != wanted[key]}
        if other:
            wanted = {key: wanted[key] for key in other}
            raise ArgumentError(
                f"out must not hold another training's checkpoint, {path} has {other} instead of "
                f"{wanted}: remove it or choose another folder"
            )
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.losses = state["step"], state["losses"]


def rate(step: int, steps: int) -> float:
    """The learning rate of a step, as a share of its peak."""
    warm = max(1, min(steps // 10, 300))
    if step < warm:
        return (step + 1) / warm
    return (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2


@dataclasses.dataclass(frozen=True)
class Batch:
    """Images and their ground truth."""

    images: Tensor  # (N, 3, H, W) float32 in [0, 1]
    masks: Tensor  # (N, H, W) int64
    boxes: list[Tensor]  # (K_n, 4)
    labels: list[Tensor]  # (K_n,)


class Pictures:
    """Training scenes, each painted when it is first asked for and kept in 8 bits.

    Difficult objects are left out of the boxes.

    Args:
        counts: number of scenes by family.
    """

    def __init__(self, counts: dict[str, int]) -> None:
        self._scenes: ConcatDataset[Example] = ConcatDataset(
            Scenes(family, "train", count=count) for family, count in counts.items()
        )
        self._known: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Image and mask, uint8; boxes and labels."""
        if index not in self._known:
            example = self._scenes[index]
            assert example.mask is not None
            self._known[index] = (
                (example.image * 255).round().byte(),
                example.mask,
                example.boxes[~example.difficult],
                example.labels[~example.difficult],
            )
        return self._known[index]

    def batch(self, chosen: list[int]) -> Batch:
        """Some scenes."""
        images, masks, boxes, labels = zip(*(self[k] for k in chosen), strict=True)
        return Batch(
            torch.stack(images).float() / 255, torch.stack(masks).long(), [*boxes], [*labels]
        )


def augment(batch: Batch, zoom: tuple[float, float]) -> Batch:
    """Scenes zoomed, moved, mirrored and in another light, from torch's global generator.

    No class differs from its mirror image. What is beyond the scene is grey, and void in masks;
    boxes of which less than a third is left in the frame are left out.
    """
    count, _, height, width = batch.images.shape
    scale = torch.empty(count, 1).uniform_(*map(math.log, zoom)).exp()
    scale = torch.cat([scale * (1 - 2 * torch.randint(2, (count, 1))), scale], 1)  # (N, 2): x, y
    # The frame shows 1 / scale of the scene around a centre, in units of half the scene's size.
    center = (2 * torch.rand(count, 2) - 1) * (1 - 1 / scale.abs()).abs()
    grid = F.affine_grid(
        torch.cat([torch.diag_embed(1 / scale), center[:, :, None]], 2),
        [count, 1, height, width],
        align_corners=False,
    )
    images = F.grid_sample(batch.images - 0.5, grid, align_corners=False)
    contrast = torch.empty(count, 1, 1, 1).uniform_(0.8, 1.2)
    brightness = torch.empty(count, 1, 1, 1).uniform_(0.4, 0.6)
    masks = (batch.masks - VOID)[:, None].float()  # so that the zeros beyond are void
    masks = F.grid_sample(masks, grid, mode="nearest", align_corners=False)[:, 0].long() + VOID
    boxes, labels = [], []
    for k in range(count):
        moved, kept = move(batch.boxes[k], scale[k], center[k], torch.tensor([width, height]))
        boxes.append(moved)
        labels.append(batch.labels[k][kept])
    return Batch((images * contrast + brightness).clamp(0, 1), masks, boxes, labels)


def move(boxes: Tensor, scale: Tensor, center: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes (K, 4) as `augment` moves scenes, cut at the frame, and which of them are kept."""
    corners = ((2 * boxes.view(-1, 2, 2) / size - 1) - center) * scale  # the frame is [-1, 1]^2
    ends = torch.stack([corners.amin(1), corners.amax(1)], 1)
    inside = ends.clamp(-1, 1)
    areas, whole_areas = ((e[:, 1] - e[:, 0]).prod(1) for e in (inside, ends))
    kept = 3 * areas >= whole_areas
    return ((inside + 1) / 2 * size).view(-1, 4)[kept], kept
