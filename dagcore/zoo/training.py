"""Train the zoo's networks on scenes: seeded, resumable and reproducible.

A step depends only on the seed, the number of the step and the weights. An interrupted training
therefore resumes from its last checkpoint and ends with the same weights, bit for bit, as long as
machine, versions and number of threads stay the same.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import AbstractContextManager
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import checks
from ..attacks import DAG, Attack
from ..data import SCENE_CLASSES, SCENES_VERSION, Scenes
from ..data.scenes import MATERIAL, VOID
from ..defences.training import attacked, inner
from ..engine.memory import freed_memory_kept
from ..errors import ArgumentError
from ..files import atomic_write
from ..info import versions
from ..seeds import seed_of
from ..victims import Detector, detector, prepare, refresh
from ..victims.weights import read_state
from . import detection
from .backbones import fold
from .checkpoint import inside, read_metadata, save_weights
from .evaluation import evaluate
from .pictures import STRONG, Batch, Crops, Pictures, augment
from .registry import BACKBONES, Entry, build, find, load

# This project's training sets under the paper's names: number of scenes by family. Scenes of family
# 12 take the place of VOC 2012 and SBD in the paper.
TRAINING_SETS = {"07": {"07": 2000}, "07+12": {"07": 2000, "12": 4000}}
# torchvision's own values suit images of 600 pixels with more objects.
PROPOSALS = 300  # of an image, for the detector's own training and for attacks on it
DETECTION_OPTIONS = {
    "rpn_batch_size_per_image": 32,
    "rpn_post_nms_top_n_train": PROPOSALS,
    "box_batch_size_per_image": 64,
    "box_positive_fraction": 0.5,
}
LOG_STEPS = 50


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an architecture is trained."""

    samples: int
    """Number of training images, repeats counted."""
    batch: int = 8
    learning_rate: float = 1e-3
    """Peak of the learning rate, which warms up linearly and decays to 0 as a cosine."""
    weight_decay: float = 0.02
    dropout: float = 0.0
    """Dropout of fc6 and fc7. The papers' 0.5 is for 4096 channels; a narrow fc6 needs less."""
    zoom: tuple[float, float] = (0.85, 1.2)
    """Range of the zoom in augmentation."""
    start_rate: float = 1.0
    """Learning rate of the layers that a backbone brings, as a fraction of that of the others."""


RECIPES = {
    "fcn-alex": Recipe(80_000, learning_rate=8e-4),
    "fcn-vgg": Recipe(30_000),
    "dl-vgg": Recipe(25_000),
    "dl-rn101": Recipe(60_000, learning_rate=2e-3, start_rate=0.2),
    "fr-zf": Recipe(60_000, learning_rate=8e-4),
    "fr-vgg": Recipe(30_000),
    "r-fcn-rn50": Recipe(100_000, learning_rate=2e-3, start_rate=0.3),
    "r-fcn-rn101": Recipe(70_000, learning_rate=2e-3, start_rate=0.3),
    "fcos-vgg": Recipe(30_000),
}
# Backbones are trained to classify crops, whose materials are STRONG at first.
STARTS = {
    "AlexNet": Recipe(200_000, batch=32, learning_rate=2e-3),
    "ZF": Recipe(240_000, batch=32, learning_rate=2e-3),
    "VGG-16": Recipe(100_000, batch=32, learning_rate=2e-3),
    "ResNet-50": Recipe(200_000, batch=32, learning_rate=2e-3),
    "ResNet-101": Recipe(200_000, batch=32, learning_rate=2e-3),
}
# Networks that are trained against attacks: factor on the learning rate, and on the samples of
# segmentation networks.
ROBUST = 2
ATTACKED = 0.5  # fraction of each of their batches that is attacked
GROWTH = 0.3  # fraction of their steps after which the radius has grown to its full size
CROPS = {"07": 6000, "12": 6000}
FALL = 0.7  # fraction of the steps over which materials decay exponentially to those of scenes
# Prefixes of the backbone's layers: in FCN-Alex and DL-VGG, in FCN-VGG, in DL-RN101 and detectors,
# and of R-FCN's conv5.
PLACES = ("", "features.", "backbone.", "roi_heads.box_roi_pool.")


@dataclasses.dataclass(frozen=True)
class Progress:
    """The state of a training after a step."""

    name: str
    """Name of the network or backbone."""
    samples: int
    """Number of images seen so far."""
    total: int
    """Number of images of the whole training."""
    loss: float
    """Loss of the step."""


def seed_of_name(name: str) -> int:
    """Return the default seed of a network's training, made from its name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def train(
    name: str | Entry,
    *,
    out: str | Path = "zoo",
    seed: int | None = None,
    samples: int | None = None,
    start_samples: int | None = None,
    width: float | None = None,
    device: str | torch.device = "cpu",
    checkpoint_steps: int = 500,
    test_scenes: int = 200,
    callback: Callable[[Progress], None] | None = None,
) -> Path:
    """Train a network, or resume its training, and evaluate it on unseen scenes.

    The network starts from the backbone of `train_start`, which is trained first unless the folder
    has it. The folder gets NAME.pt (the checkpoint), NAME.jsonl and NAME.png (the losses) and at
    the end NAME.safetensors. In that file batch norms of plain networks are folded, weights are
    rounded to float16, and the score is that of the rounded weights.

    Args:
        name: name as in the paper's tables, such as "FCN-VGG*"; or an entry, such as
            `find("FCN-Alex").against(Adversary("pgd", 4 / 255, 3))`.
        out: output folder, made if it is missing.
        seed: seed of heads, order and augmentation; `seed_of_name` if None.
        samples: number of training images, repeats counted, rounded up to whole batches; as in
            `RECIPES` if None.
        start_samples: the same for `train_start`.
        width: factor on the channels; the shipped network's if None.
        device: where to train.
        checkpoint_steps: number of steps between checkpoints.
        test_scenes: number of scenes for the score.
        callback: called with a `Progress` after every step.

    Returns:
        The path of the weights.

    Raises:
        ValueError: if the name is unknown, a number is out of range, or the folder holds the
            checkpoint of another training.
    """
    entry = find(name)
    seed = seed_of_name(entry.name) if seed is None else seed
    recipe = _recipe(recipe_of(entry), samples, seed)
    checks.integer("test_scenes", test_scenes, at_least=1)
    width = entry.width if width is None else width
    start = train_start(
        entry.backbone,
        width=width,
        out=out,
        samples=start_samples,
        device=device,
        checkpoint_steps=checkpoint_steps,
        callback=callback,
    )
    with _own_generators(device):
        training = FineTuning(entry, recipe, seed=seed, width=width, device=device, start=start)
        _carry_out(training, Path(out), checkpoint_steps, callback)
        return finish(training, Path(out) / f"{entry.slug}.safetensors", test_scenes)


def train_start(
    backbone: str,
    *,
    width: float,
    out: str | Path = "zoo",
    samples: int | None = None,
    device: str | torch.device = "cpu",
    checkpoint_steps: int = 500,
    callback: Callable[[Progress], None] | None = None,
) -> Path:
    """Train a backbone to classify crops; every network with this backbone starts from it.

    It takes the place of the paper's pretraining on ImageNet. A finished training is not repeated.

    Args:
        backbone: one of `registry.BACKBONES`.
        width: factor on the channels.
        out: output folder, which gets start-NAME-WIDTH.safetensors and the files that `train`
            makes.
        samples: number of training crops, repeats counted; as in `STARTS` if None.
        device: where to train.
        checkpoint_steps: number of steps between checkpoints.
        callback: called with a `Progress` after every step.

    Returns:
        The path of the weights in float16, with the batch norms and the classifier.

    Raises:
        ValueError: if the backbone is unknown, a number is out of range, or the folder holds the
            weights of another training.
    """
    checks.choice("backbone", backbone, BACKBONES)
    checks.number("width", width, above=0)
    slug = start_name(backbone, width)
    recipe, seed = _recipe(STARTS[backbone], samples, 0), seed_of_name(slug)
    path = Path(out) / f"{slug}.safetensors"
    metadata = {
        "backbone": backbone,
        "width": width,
        "classes": list(SCENE_CLASSES),
        "scenes": SCENES_VERSION,
        "seed": seed,
        "samples": recipe.samples,
    }
    if path.is_file():
        known = read_metadata(path)
        if {key: known.get(key) for key in metadata} != metadata:
            raise ArgumentError(
                f"out must not hold another training's start, {path} has {known} instead of "
                f"{metadata}: remove it or choose another folder"
            )
        return path
    with _own_generators(device):
        training = Pretraining(backbone, recipe, seed=seed, width=width, device=device)
        _carry_out(training, Path(out), checkpoint_steps, callback)
    save_weights(path, training.network, metadata)
    return path


def recipe_of(entry: Entry) -> Recipe:
    """Return the default recipe of a network."""
    recipe = RECIPES[entry.architecture]
    if entry.adversary is None:
        return recipe
    samples = recipe.samples * (ROBUST if entry.task == "segmentation" else 1)
    return dataclasses.replace(recipe, samples=samples, learning_rate=ROBUST * recipe.learning_rate)


def start_name(backbone: str, width: float) -> str:
    """Return the name of a backbone's training and of its files."""
    wide = str(Fraction(width).limit_denominator(1000)).replace("/", "of")
    return f"start-{backbone.lower()}-{wide}"


def _recipe(recipe: Recipe, samples: int | None, seed: int) -> Recipe:
    """Return a recipe with another number of samples, unless that is None; check the numbers."""
    checks.integer("seed", seed, at_least=0)
    if samples is None:
        return recipe
    checks.integer("samples", samples, at_least=1)
    return dataclasses.replace(recipe, samples=samples)


def _own_generators(device: str | torch.device) -> AbstractContextManager[None]:
    """Return a context in which torch's generators may be seeded; it restores them at its end."""
    where = torch.device(device)
    devices = [] if where.type == "cpu" else [where]
    return torch.random.fork_rng(devices, device_type=where.type)


def _carry_out(
    training: Training,
    folder: Path,
    checkpoint_steps: int,
    callback: Callable[[Progress], None] | None,
) -> None:
    """Run all steps of a training from its last checkpoint on."""
    checks.integer("checkpoint_steps", checkpoint_steps, at_least=1)
    folder.mkdir(parents=True, exist_ok=True)
    training.restore(folder / f"{training.slug}.pt")
    with freed_memory_kept():
        while training.step < training.steps:
            loss = training.advance()
            if training.step % checkpoint_steps == 0 or training.step == training.steps:
                training.save(folder)
            if callback is not None:
                seen, total = (k * training.recipe.batch for k in (training.step, training.steps))
                callback(Progress(training.name, seen, total, loss))


def finish(training: FineTuning, path: Path, test_scenes: int) -> Path:
    """Write the weights of a finished training with their score, and return the path."""
    entry = training.entry
    metadata = {
        "width": training.width,
        "classes": list(SCENE_CLASSES),
        "scenes": SCENES_VERSION,
        "training_set": entry.training_set,
        "start": hashlib.sha256(training.start.read_bytes()).hexdigest(),
        "seed": training.seed,
        "samples": training.recipe.samples,
        **({} if entry.adversary is None else dataclasses.asdict(entry.adversary)),
        "versions": {key: versions()[key] for key in ("torch", "numpy")},
    }
    save_weights(path, fold(training.network), metadata)
    network = load(entry, path, device=training.device)
    scenes = Scenes("07", "test", count=test_scenes)
    protocols = {"score": "voc2007", "coco": "coco"}
    for key in ("score", "coco") if entry.task == "detection" else ("score",):
        score = evaluate(network, scenes, protocol=protocols[key]).mean
        metadata[key] = None if math.isnan(score) else round(score, 2)
    save_weights(path, network, {**metadata, "test_scenes": test_scenes})
    return path


class Training(abc.ABC):
    """A training and its state, which checkpoints hold.

    Attributes:
        name: name of the network or backbone.
        slug: name of its files.
        pictures: training data.
        brought: names of the parameters that learn at `Recipe.start_rate`.
    """

    name: str
    slug: str
    pictures: Pictures | Crops
    brought: Set[str] = frozenset()

    def __init__(
        self, recipe: Recipe, *, seed: int, width: float, device: str | torch.device
    ) -> None:
        self.recipe, self.seed, self.width = recipe, seed, width
        self.device = torch.device(device)
        self.step, self.steps = 0, -(-recipe.samples // recipe.batch)
        self.losses: dict[str, list[float]] = {}
        self.draw(0)
        # Channels last makes training on CPUs faster by a fifth to a half.
        self.network = self.build().to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        groups: list[dict[str, Any]] = []
        for brought in (False, True):
            parameters = [
                value
                for name, value in inside(self.network).named_parameters()
                if (name in self.brought) is brought
            ]
            share = recipe.start_rate if brought else 1.0
            groups += [
                {"params": [p for p in parameters if p.dim() > 1], "share": share},
                {
                    "params": [p for p in parameters if p.dim() <= 1],
                    "weight_decay": 0.0,
                    "share": share,
                },
            ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )

    @abc.abstractmethod
    def build(self) -> nn.Module:
        """Return the network before its first step."""

    @abc.abstractmethod
    def losses_of(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of a batch by name."""

    def batch(self) -> Batch:
        """Return the batch of the next step."""
        return self.pictures.batch(self.chosen())

    def draw(self, *purpose: int) -> None:
        """Seed torch's generators for one purpose: 0 for the weights, (1, epoch) or (2, step)."""
        torch.manual_seed(seed_of(self.seed, *purpose, bits=32))

    def chosen(self) -> list[int]:
        """Return the indices of the next step's pictures; each epoch shuffles all of them anew."""
        first, count = self.step * self.recipe.batch, len(self.pictures)
        numbers = range(first, first + self.recipe.batch)
        orders = {}
        for epoch in {number // count for number in numbers}:
            self.draw(1, epoch)
            orders[epoch] = torch.randperm(count).tolist()
        return [orders[number // count][number % count] for number in numbers]

    def advance(self) -> float:
        """Take one step, and return its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["share"] * self.recipe.learning_rate * rate(self.step, self.steps)
        batch = self.batch()
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

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that a checkpoint must share for a training to resume from it."""
        recipe = {key: str(value) for key, value in dataclasses.asdict(self.recipe).items()}
        return {
            "name": self.name,
            "scenes": SCENES_VERSION,
            "seed": self.seed,
            "width": self.width,
            **recipe,
        }

    def save(self, folder: Path) -> None:
        """Write the checkpoint, the losses and their plot, each file atomically."""
        from .curves import draw_losses

        state = {
            "settings": self.settings,
            "step": self.step,
            "losses": self.losses,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        stem = folder / self.slug
        with atomic_write(stem.with_name(f"{stem.name}.jsonl")) as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in self.log()))
        draw_losses(stem.with_name(f"{stem.name}.png"), self.name, list(self.log()))
        with atomic_write(stem.with_name(f"{stem.name}.pt")) as path:
            torch.save(state, path)

    def log(self) -> Iterator[dict[str, float]]:
        """Yield the means of the losses over `LOG_STEPS` steps at a time."""
        for first in range(0, self.step, LOG_STEPS):
            last = min(first + LOG_STEPS, self.step)
            means = {key: sum(v[first:last]) / (last - first) for key, v in self.losses.items()}
            yield {"samples": last * self.recipe.batch, **means}

    def restore(self, path: Path) -> None:
        """Resume from a checkpoint if there is one.

        Raises:
            ValueError: if the checkpoint cannot be read or is that of another training.
        """
        if not path.is_file():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            settings = state["settings"]
        except Exception as error:  # a malformed file may raise anything
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


class FineTuning(Training):
    """Training of a network of the zoo that starts from a pretrained backbone.

    Args:
        entry: the network.
        recipe: how it is trained.
        seed: seed of heads, order and augmentation.
        width: factor on the channels.
        device: where to train.
        start: file with the backbone's weights.
    """

    def __init__(
        self,
        entry: Entry,
        recipe: Recipe,
        *,
        seed: int,
        width: float,
        device: str | torch.device,
        start: Path,
    ) -> None:
        self.entry, self.name, self.slug, self.start = entry, entry.name, entry.slug, start
        self.pictures = Pictures(TRAINING_SETS[entry.training_set])
        super().__init__(recipe, seed=seed, width=width, device=device)

    def build(self) -> nn.Module:
        """Return the network with the backbone's weights and new heads."""
        entry = self.entry
        options: dict[str, Any] = dict(DETECTION_OPTIONS) if entry.two_stage else {}
        if "rn" not in entry.architecture:
            options["norm"] = True
            if entry.architecture != "fcos-vgg":
                options["dropout"] = self.recipe.dropout
        network = build(entry, num_classes=len(SCENE_CLASSES), width=self.width, **options)
        self.brought = begin(network, read_state(self.start))
        return network

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that a checkpoint must share for a training to resume from it."""
        return {**super().settings, "adversary": str(self.entry.adversary)}

    @functools.cached_property
    def victim(self) -> nn.Module:
        """The faster copy that is attacked, which follows the network's weights."""
        detects = self.entry.task == "detection"
        return prepare(detector(self.network) if detects else self.network)

    def seen(self, batch: Batch) -> Tensor:
        """Return the images of a batch, some of them attacked if the entry has an adversary."""
        images, adversary = batch.images.to(self.device), self.entry.adversary
        if adversary is None:
            return images
        grown = min(1.0, (self.step + 1) / (GROWTH * self.steps))
        attack = inner(adversary.attack, grown * adversary.epsilon, adversary.steps)
        count = round(ATTACKED * len(images))
        chosen, others = images[:count], images[count:]
        if self.entry.task == "segmentation":
            masks = batch.masks[:count].to(self.device)
            made = attacked(attack, self.victim, chosen, masks, share=1.0)
        else:
            made = self.attacked_detector(attack, chosen, batch)
        return torch.cat([made, others])

    def attacked_detector(self, attack: Attack, images: Tensor, batch: Batch) -> Tensor:
        """Return the first images of a batch attacked at the detector's current proposals."""
        victim = self.victim
        assert isinstance(victim, Detector)
        refresh(victim)  # the proposals are those of its current weights
        truth = [
            {"boxes": boxes, "labels": labels}
            for boxes, labels in zip(batch.boxes, batch.labels, strict=True)
        ][: len(images)]
        aims = victim.dense_targets(images, truth, max_proposals=PROPOSALS)
        return attacked(
            attack,
            victim,
            images,
            aims.labels,
            share=1.0,
            adversarial_labels=aims.adversarial_labels if isinstance(attack, DAG) else None,
            boxes=aims.boxes,
        )

    def losses_of(self, batch: Batch) -> dict[str, Tensor]:
        """Return the cross-entropy of segmentation, or torchvision's losses of detectors."""
        images = self.seen(batch)
        self.network.train()
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


def begin(network: nn.Module, start: Mapping[str, Tensor]) -> set[str]:
    """Load the weights of a pretrained backbone into a network, in place.

    Returns:
        The names of the weights that it brings, within the architecture of the network.

    Raises:
        ValueError: if the network has no place for some of the weights.
    """
    state = inside(network).state_dict()
    brought = set()
    for key, value in start.items():
        if key.startswith("classifier."):
            continue
        places = [prefix + key for prefix in PLACES if prefix + key in state]
        if len(places) != 1 or state[places[0]].shape != value.shape:
            raise ArgumentError(f"start must fit the network, which has no place for {key}")
        with torch.no_grad():
            state[places[0]].copy_(value)
        brought.add(places[0])
    return brought


class Pretraining(Training):
    """Training of a backbone to classify crops, whose materials are strong at first.

    Networks do not learn materials as weak as those of scenes from scratch.
    """

    def __init__(
        self, backbone: str, recipe: Recipe, *, seed: int, width: float, device: str | torch.device
    ) -> None:
        self.backbone = backbone
        self.name = self.slug = start_name(backbone, width)
        self.pictures: Crops = Crops(CROPS)
        super().__init__(recipe, seed=seed, width=width, device=device)

    def build(self) -> nn.Module:
        """Return the backbone with a mean over its features and a linear classifier."""
        network: Any = BACKBONES[self.backbone].build(width=self.width)
        with torch.no_grad():
            channels = network.eval()(torch.zeros(1, 3, 64, 64)).shape[1]
        network.add_module("mean", nn.AdaptiveAvgPool2d(1))
        network.add_module("flat", nn.Flatten())
        network.add_module("classifier", nn.Linear(channels, len(SCENE_CLASSES)))
        return network  # type: ignore[no-any-return]

    def batch(self) -> Batch:
        """Return a batch of crops whose materials have the strength of this step."""
        fallen = min(1.0, self.step / self.steps / FALL)
        return self.pictures.batch(self.chosen(), STRONG * (MATERIAL / STRONG) ** fallen)

    def losses_of(self, batch: Batch) -> dict[str, Tensor]:
        """Return the cross-entropy of the crops' classes."""
        images = (batch.images.to(self.device) - detection.MEAN[0]) / detection.STD[0]
        return {
            "cross_entropy": F.cross_entropy(
                self.network(images), torch.cat(batch.labels).to(self.device)
            )
        }


def rate(step: int, steps: int) -> float:
    """Return the learning rate of a step, as a fraction of its peak."""
    warm = max(1, min(steps // 10, 300))
    if step < warm:
        return (step + 1) / warm
    return (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
