"""Attacks on the images of an experiment, each run once and kept in its own file."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import as_completed
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from .. import zoo
from ..attacks import DAG, Part, Result, joint_stream, universal_perturbation
from ..data import SCENE_CLASSES, SCENES_VERSION, VOC, VOC_CLASSES, Example, Scenes
from ..engine.stream import Sample
from ..errors import ArgumentError
from ..evaluation import kept
from ..evaluation.options import find_device
from ..evaluation.progress import Progress
from ..info import versions
from ..labels import assign
from ..metrics import Score
from ..perturbation import fit, round_to_8_bits
from ..processes import cores, pool
from ..seeds import generator_of
from ..victims import Detector, Victim, load, prepare
from ..zoo.evaluation import evaluate

CHUNK = 5  # number of images that a process attacks together
IGNORE = 255


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """Settings that all experiments of a run share.

    Attributes:
        out: output folder.
        images: number of images.
        max_iter: maximum number of updates of every attack; that of each experiment if None.
        seed: seed of adversarial labels and permutations.
        device: where to run; a GPU if there is one, if None.
        data: "scenes" (the test scenes of family 07), or the path of a VOCdevkit (VOC2007 test).
        weights: folder with NAME.safetensors (or .pth) of networks; the zoo's weights if None.
        jobs: number of parallel processes; if None one per core, or one on a GPU.
    """

    out: Path
    images: int = 100
    max_iter: int | None = None
    seed: int = 0
    device: str | None = None
    data: str = "scenes"
    weights: Path | None = None
    jobs: int | None = None

    def attack(self, *networks: str, **settings: Any) -> Attack:
        """Return an attack with the paper's settings, unless others are given."""
        limit = {} if self.max_iter is None else {"max_iter": self.max_iter}
        return Attack.of(*networks, **{**settings, **limit})

    def victim(self, network: str) -> Victim | Detector:
        """Return a network of the zoo as a victim.

        Raises:
            ValueError: if its classes are not those of the data.
        """
        path = None if self.weights is None else self.path(network)
        victim = load(network, path, find_device(self.device))
        if victim.classes is None:
            victim.classes = VOC_CLASSES  # the user's own weights
        wanted = SCENE_CLASSES if self.data == "scenes" else VOC_CLASSES
        if victim.classes != wanted:
            raise ArgumentError(
                f"{network} must have the classes of --data {self.data} ({', '.join(wanted[1:4])}, "
                f"...), it has {', '.join(victim.classes[1:4])}, ...: use other --weights"
            )
        return victim

    def path(self, network: str) -> Path:
        """Return the path of a network's weights."""
        entry = zoo.find(network)
        if self.weights is None:
            return entry.shipped()
        stem = self.weights / entry.slug
        for path in map(stem.with_suffix, (".safetensors", ".pth", ".pt")):
            if path.is_file():
                return path
        raise FileNotFoundError(f"--weights: {stem}.safetensors or .pth does not exist")

    def made_with(self, networks: Sequence[str]) -> dict[str, Any]:
        """Return what results depend on: the data, the seed, and the content of the weights."""
        weights = {network: _digest(self.path(network)) for network in networks}
        data = f"scenes {SCENES_VERSION}" if self.data == "scenes" else self.data
        return {"data": data, "seed": self.seed, "weights": weights}

    def examples(self, task: str) -> Sequence[Example]:
        """Return the images, in order, with the ground truth of a task."""
        return _examples(self.data, task, self.images)

    def others(self, task: str, count: int) -> Sequence[Example]:
        """Return images that are not among the `examples`, nor among the training scenes."""
        if self.data == "scenes":
            return Scenes("07", "val", count=count)  # type: ignore[return-value]
        found = VOC(self.data, task, sets=[("2007", "trainval")])
        return Subset(found, _in_order(found)[:count])  # type: ignore[return-value]

    def example(self, index: int) -> Example:
        """Return one of the images, with both its mask and its boxes."""
        masked, boxed = (self.examples(task)[index] for task in ("segmentation", "detection"))
        return dataclasses.replace(boxed, mask=masked.mask)


@cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _in_order(examples: VOC) -> list[int]:
    """Return the indices of the images, in the order of their names."""
    return sorted(range(len(examples)), key=examples.keys.__getitem__)


@lru_cache(maxsize=4)
def _examples(data: str, task: str, count: int) -> Sequence[Example]:
    if data == "scenes":
        return Scenes("07", "test", count=count)  # type: ignore[return-value]
    # Only images that have both masks and boxes, so that all tables use the same ones.
    test = [("2007", "test")]
    names = set(VOC(data, "segmentation", sets=test).keys)
    found = VOC(data, task, sets=test)
    chosen = [k for k in _in_order(found) if found.keys[k] in names][:count]
    if len(chosen) < count:
        raise ArgumentError(
            f"--images must be at most {len(chosen)}, the number of images, got {count}"
        )
    return Subset(found, chosen)  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack:
    """A DAG attack on one network, or on several with one perturbation.

    A universal attack has one perturbation for all images, made on other images.
    """

    networks: tuple[str, ...]
    gamma: float = 0.5 / 255
    max_iter: int
    nms_threshold: float = 0.9
    """NMS threshold of a detector's region network."""
    universal: int = 0
    """Number of other images that it is made on; 0 for one perturbation per image."""
    epsilon: float | None = None
    margin: float = 0.0
    levels: int | None = None

    @classmethod
    def of(cls, *networks: str, **settings: Any) -> Attack:
        """Return an attack with the paper's updates: at most 200 for segmentation, else 150."""
        tasks = {zoo.find(network).task for network in networks}
        updates = 200 if "segmentation" in tasks else 150
        return cls(**{"networks": networks, "max_iter": updates, **settings})

    @property
    def folder(self) -> str:
        """Name of the folder with the attack's perturbations."""
        plain = Attack.of(*self.networks)
        own = dataclasses.asdict(self)
        other = [k for k, v in dataclasses.asdict(plain).items() if own[k] != v]
        slugs = "+".join(zoo.find(network).slug for network in self.networks)
        return "-".join([slugs, *(f"{k}={own[k]:.4g}" for k in sorted(other))])

    def count(self, setup: Setup) -> int:
        """Return the number of perturbations: one per image, or 1 if the attack is universal."""
        return 1 if self.universal else setup.images

    def dag(self) -> DAG:
        """Return the attack itself."""
        return DAG(
            gamma=self.gamma,
            max_iter=self.max_iter,
            epsilon=self.epsilon,
            ignore_index=IGNORE,
            margin=self.margin,
            levels=self.levels,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Perturbation:
    """A kept perturbation, with the numbers of its attack."""

    key: str | None
    """Key of the image; None for a universal perturbation."""
    values: Tensor
    """The perturbation (3, H, W)."""
    iterations: int
    """Number of updates."""
    status: str
    active: list[int]
    """Number of active targets after 0, 1, ... updates."""
    targets: int
    """Number of targets."""
    proposals: int
    """Number of a detector's proposals before the filter; of a segmentation network's targets."""
    perceptibility: float


def path_of(setup: Setup, attack: Attack, index: int) -> Path:
    """Return the path of the file with the perturbation of image number `index`."""
    index = index if not attack.universal else 0
    return setup.out / "perturbations" / attack.folder / f"{index:06d}.safetensors"


def settings_of(setup: Setup, attack: Attack) -> dict[str, Any]:
    """Return the settings that a kept perturbation must have to be used again."""
    return {
        **dataclasses.asdict(attack),
        "networks": list(attack.networks),  # a list, as JSON returns it
        **setup.made_with(attack.networks),
    }


def read(setup: Setup, attack: Attack, index: int) -> Perturbation:
    """Read a kept perturbation."""
    path = path_of(setup, attack, index)
    known = kept.known_of(path)
    del known["settings"], known["versions"]
    return Perturbation(values=kept.read_tensor(path, "perturbation"), **known)


def read_all(setup: Setup, attack: Attack) -> list[Perturbation]:
    """Read the perturbations of all images, which must exist."""
    return [read(setup, attack, k) for k in range(setup.images)]


def is_kept(setup: Setup, attack: Attack, index: int) -> bool:
    """Return whether a perturbation is kept already; raise if it has other settings."""
    return kept.is_kept(path_of(setup, attack, index), settings_of(setup, attack))


def make_perturbations(setup: Setup, attacks: Sequence[Attack], counter: Progress) -> None:
    """Make the perturbations of all images by all attacks, except those that are kept already."""
    for network in {network for attack in attacks for network in attack.networks}:
        setup.victim(network)  # raises before any work if it is unfit
    missing: dict[Attack, list[int]] = {}
    for attack in attacks:
        count = attack.count(setup)
        gaps = [k for k in range(count) if not is_kept(setup, attack, k)]
        counter.add(attack.folder, count, done=count - len(gaps))
        if gaps:
            missing[attack] = gaps
    # Attack the same images together as without an interruption, so that they get the same bits.
    tasks = [
        (attack, list(range(first, min(first + CHUNK, attack.count(setup)))))
        for attack, gaps in missing.items()
        for first in sorted({gap - gap % CHUNK for gap in gaps})
    ]
    for (attack, indexes), _ in run(setup, attack_images, tasks):
        counter.advance(attack.folder, len(set(indexes) & set(missing[attack])))


def run(
    setup: Setup, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]
) -> Iterator[tuple[Any, Any]]:
    """Call function(setup, *task) for each task, in parallel processes on the CPU.

    Yields:
        Each task with its result, in the order in which they finish.
    """
    on_gpu = find_device(setup.device).type != "cpu"
    jobs = setup.jobs or (1 if on_gpu else cores())
    if jobs == 1 or not tasks:
        for task in tasks:
            yield task, function(setup, *task)
        return
    # The number of threads does not depend on the work left, since it changes the last bits.
    with pool(min(jobs, len(tasks)), threads=max(1, cores() // jobs)) as processes:
        running = {processes.submit(function, setup, *task): task for task in tasks}
        for future in as_completed(running):
            yield running[future], future.result()


@lru_cache(maxsize=4)
def _victim(setup: Setup, network: str) -> Any:
    """Return a prepared victim, cached for the next images."""
    return prepare(setup.victim(network))


def attack_images(setup: Setup, attack: Attack, indexes: Sequence[int]) -> None:
    """Attack some images together, and keep the perturbations that are not kept yet."""
    dag = attack.dag()
    victims = [_victim(setup, network) for network in attack.networks]
    if attack.universal:
        (network,), (victim,) = attack.networks, victims
        others = Plain(setup, setup.others(zoo.find(network).task, attack.universal))
        _keep(setup, attack, 0, None, universal_perturbation(dag, victim, others), 1)
        return
    samples = [target(setup, attack, victims, k) for k in indexes]
    if len(victims) == 1:
        results = dag.stream(victims[0], samples, len(samples))
    else:
        missing = [one for one in samples if not is_kept(setup, attack, one.key[0])]
        results = joint_stream(dag, [Part(victim) for victim in victims], missing, slots=1)
    for result in results:
        index, key, proposals = result.key
        if not is_kept(setup, attack, index):
            _keep(setup, attack, index, key, result, proposals)


class Plain(Sequence[Sample]):
    """Examples as samples with their masks, each target to leave its class for the runner-up."""

    def __init__(self, setup: Setup, examples: Sequence[Example]) -> None:
        self.device, self.examples = find_device(setup.device), examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        """Return one sample."""
        example = self.examples[index]
        assert example.mask is not None
        return Sample(example.image.to(self.device), example.mask.to(self.device), "runner-up")


def _keep(
    setup: Setup, attack: Attack, index: int, key: str | None, result: Result, proposals: int
) -> None:
    """Keep the perturbation of an image, with the numbers of its attack."""
    active = result.active[..., 0]
    if active.dim() > 1:  # one count per network; all are -1 once the image has stopped
        active = torch.where(active[:, 0] >= 0, active.sum(1), -1)
    known = {
        "key": key,
        "iterations": int(result.iterations[0]),
        "status": str(result.status[0]),
        "active": [count for count in active.tolist() if count >= 0],
        "targets": int(result.targets.sum()),
        "proposals": proposals,
        "perceptibility": float(result.perceptibility[0]),
        "versions": versions(),
    }
    path = path_of(setup, attack, index)
    kept.keep_tensor(
        path, "perturbation", result.perturbation[0], known, settings_of(setup, attack)
    )


def target(setup: Setup, attack: Attack, victims: Sequence[Any], index: int) -> Sample:
    """Return the sample of an attack on an image; its key is (index, image's key, proposals)."""
    samples = [
        _target(setup, attack, network, victim, index)
        for network, victim in zip(attack.networks, victims, strict=True)
    ]
    if len(samples) == 1:
        return samples[0]
    names = ("labels", "adversarial_labels", "boxes")
    columns: dict[str, Any] = {name: [getattr(one, name) for one in samples] for name in names}
    key = (*samples[0].key[:2], sum(one.key[2] for one in samples))
    return dataclasses.replace(samples[0], key=key, **columns)


def _target(setup: Setup, attack: Attack, network: str, victim: Any, index: int) -> Sample:
    example = setup.examples(zoo.find(network).task)[index]
    generator = generator_of(setup.seed, 0, index)
    image = example.image.to(find_device(setup.device))
    if isinstance(victim, Detector):
        targets = victim.dense_targets(
            image[None],
            [example],
            nms_threshold=attack.nms_threshold,
            generator=generator,
            ignore_index=IGNORE,
        )
        (sample,) = targets.samples(image[None], [(index, example.key, int(targets.proposals[0]))])
        return sample
    assert example.mask is not None
    labels = example.mask[None].to(image.device)
    adversarial = assign("permutation", labels, len(victim.classes), IGNORE, generator)
    assert isinstance(adversarial, Tensor)
    key = (index, example.key, int((labels != IGNORE).sum()))
    return Sample(image, labels[0], adversarial[0], key=key)


def seconds(setup: Setup, attacks: Sequence[Attack], count: int) -> dict[Attack, float]:
    """Return the seconds per image of each attack on one network, measured once and kept.

    The images are attacked one by one, and the attacks alternate.
    """
    paths = {one: setup.out / "scores" / "seconds" / f"{one.folder}.json" for one in attacks}
    of = {one: {**settings_of(setup, one), "images": count} for one in attacks}
    found = [kept.read_json(paths[one], of[one]) for one in attacks]
    if None not in found:
        return {one: known["seconds"] for one, known in zip(attacks, found, strict=True) if known}
    spent = dict.fromkeys(attacks, 0.0)
    for index in range(count):
        for attack in attacks:
            victim = _victim(setup, attack.networks[0])
            start = time.perf_counter()
            sample = target(setup, attack, [victim], index)
            list(attack.dag().stream(victim, [sample], slots=1))
            spent[attack] += (time.perf_counter() - start) / count
    for one in attacks:
        kept.keep_json(paths[one], {"seconds": spent[one], "versions": versions()}, of[one])
    return spent


def score(
    setup: Setup,
    network: str,
    added: Iterable[tuple[str | None, Tensor]] | None = None,
    *,
    in_8_bits: bool = False,
) -> Score:
    """Measure a network's score on the images.

    Args:
        setup: settings of the run.
        network: name of the network.
        added: for each image its key, and the perturbation (3, H, W) that is added to it.
        in_8_bits: whether the sums are rounded as in 8-bit files.
    """
    victim = setup.victim(network)
    examples = setup.examples(zoo.find(network).task)
    inside: Any = victim
    if isinstance(victim, Detector):
        inside = victim.network
        inside.classes = victim.classes
    return evaluate(inside, examples if added is None else _added(examples, added, in_8_bits))


def _added(
    examples: Sequence[Example], added: Iterable[tuple[str | None, Tensor]], in_8_bits: bool
) -> Iterator[Example]:
    for example, (key, r) in zip(examples, added, strict=True):
        if key not in (None, example.key):
            raise ArgumentError(
                f"--data must have masks and boxes of the same images, got {example.key} for {key}"
            )
        r = fit(r[None], example.image.shape[1:])[0]  # a universal one may have another size
        image = (example.image + r).clamp(0, 1)
        yield dataclasses.replace(example, image=round_to_8_bits(image) if in_8_bits else image)
