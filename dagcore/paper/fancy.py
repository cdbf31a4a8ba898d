"""The paper's fancy examples: painted segmentations, several networks fooled at once, noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attacks import DAG, Part, joint_attack
from ..data import Example
from ..errors import ArgumentError
from ..evaluation import figures
from ..evaluation.kept import keep_json, read_json
from ..evaluation.options import find_device
from ..evaluation.predict import predict
from ..evaluation.progress import Progress
from ..labels import derangement, paint, pattern
from ..perturbation import perceptibility
from ..seeds import generator_of
from ..victims import Detector, prepare
from .work import IGNORE, Setup, run

NETWORKS = ("FCN-Alex", "FCN-VGG")
DETECTOR = "FR-VGG-07"
PATTERNS = ("circle", "square", "stripes", "text:AI")  # few letters: score maps are coarse
BACKGROUND = 0
UPDATES = 600  # a prescribed segmentation takes more of them than leaving the true one
ENOUGH = 0.01  # of the pixels may miss a prescribed mask, as in the authors' released code

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Scenario:
    """One example: a name for its files, and how it is made."""

    name: str
    title: str
    make: Callable[[Setup, Scenario], list[Row]]
    network: str = ""
    what: str = ""


def painted(setup: Setup, scenario: Scenario) -> list[Row]:
    """A network sees a pattern of a class that is not in the image, and background around it."""
    index = PATTERNS.index(scenario.what)
    example, image = _image(setup, index)
    victim = prepare(setup.victim(scenario.network))
    mask = pattern(scenario.what, *image.shape[1:])
    aim = paint(mask, _absent(setup, victim, example, index), BACKGROUND).to(image.device)
    return _reach(setup, scenario, victim, image, aim)


def noise(setup: Setup, scenario: Scenario) -> list[Row]:
    """An image without content that a network segments as a chosen object (the slides' type 2)."""
    _, image = _image(setup, 0)
    generator = generator_of(setup.seed, 2, 0)
    image = torch.rand(image.shape, generator=generator).to(image.device)
    victim = prepare(setup.victim(scenario.network))
    chosen = 1 + int(torch.randint(len(victim.classes or ()) - 1, (), generator=generator))
    mask = pattern("circle", *image.shape[1:])
    return _reach(setup, scenario, victim, image, paint(mask, chosen, BACKGROUND).to(image.device))


def two_masks(setup: Setup, scenario: Scenario) -> list[Row]:
    """One perturbation that gives two networks different pre-specified segmentations."""
    example, image = _image(setup, 4)
    victims = [prepare(setup.victim(name)) for name in NETWORKS]
    aims = []
    for k, (victim, what) in enumerate(zip(victims, ("circle", "stripes"), strict=True)):
        inside = _absent(setup, victim, example, 10 + k)
        aims.append(paint(pattern(what, *image.shape[1:]), inside, BACKGROUND).to(image.device))
    result = joint_attack(
        DAG(goal="reach", max_iter=UPDATES, tolerance=ENOUGH, ignore_index=IGNORE),
        [Part(v, aim[None], aim[None]) for v, aim in zip(victims, aims, strict=True)],
        image[None],
    )
    return [
        _seen(setup, scenario, name, victim, image, result.adversarial[0], aim, result)
        for name, victim, aim in zip(NETWORKS, victims, aims, strict=True)
    ]


def two_tasks(setup: Setup, scenario: Scenario) -> list[Row]:
    """One perturbed image that fools a detector and a segmentation network."""
    example, image = _image(setup, 3)
    generator = generator_of(setup.seed, 2, 3)
    segmenter, detector = setup.victim("FCN-VGG"), setup.victim(DETECTOR)
    assert isinstance(detector, Detector)
    assert example.mask is not None
    labels = example.mask.to(image.device)
    table = derangement(len(segmenter.classes or ()), generator).to(image.device)
    counted = labels != IGNORE
    aim = torch.where(counted, table[torch.where(counted, labels, 0).long()], IGNORE)
    targets = detector.dense_targets(image[None], [example], generator=generator)
    result = joint_attack(
        DAG(max_iter=UPDATES, ignore_index=IGNORE),
        [
            Part(segmenter, labels[None].long(), aim[None]),
            Part(detector, targets.labels, targets.adversarial_labels, boxes=targets.boxes),
        ],
        image[None],
    )
    attacked = result.adversarial[0]
    rows = []
    for k, (name, victim) in enumerate((("FCN-VGG", segmenter), (DETECTOR, detector))):
        size = (labels.shape[0], labels.shape[1])
        before, after = (predict(victim, x, size) for x in (image, attacked))
        path = _picture(setup, scenario, name)
        common = {"image": image.cpu(), "adversarial": attacked.cpu(), "classes": victim.classes}
        if isinstance(before, Tensor):
            figures.attack_figure(path, predicted=before, attacked=after, **common)  # type: ignore
        else:
            figures.detection_figure(path, predicted=before, attacked=after, **common)  # type: ignore
        left, total = int(result.active[result.iterations[0], k, 0]), int(result.targets[k, 0])
        if not total:
            raise ArgumentError(f"{scenario.title}: {name} finds no targets in {example.key}")
        rows.append(_row(scenario, name, result, 1 - left / total, path))
    return rows


SCENARIOS = (
    *(
        Scenario(
            f"{what.partition(':')[0]}-{name.lower()}",
            f"{what.partition(':')[0]}, prescribed to {name}",
            painted,
            name,
            what,
        )
        for what in PATTERNS
        for name in NETWORKS
    ),
    Scenario("two-masks", "one image, two prescribed segmentations", two_masks),
    Scenario("two-tasks", "one image that fools a segmenter and a detector", two_tasks),
    Scenario("noise", "noise, prescribed to be an object", noise, "FCN-VGG"),
)


def fancy(setup: Setup, counter: Progress) -> list[Row]:
    """Make the examples that are not there yet; their rows, with the paths of the pictures."""
    names = [scenario.name for scenario in SCENARIOS]
    missing = [name for name in names if _known(setup, name) is None]
    counter.add("fancy examples", len(names), done=len(names) - len(missing))
    for _ in run(setup, make, [(name,) for name in missing]):
        counter.advance("fancy examples")
    return [row for name in names for row in _known(setup, name) or []]


def _made_of(setup: Setup) -> dict[str, Any]:
    """What the examples follow from."""
    return {
        **setup.made_with([*NETWORKS, DETECTOR]),
        "images": setup.images,
        "updates": UPDATES,
        "tolerance": ENOUGH,
    }


def _known(setup: Setup, name: str) -> list[Row] | None:
    """The rows of an example that is kept, if they still follow from what there is."""
    known = read_json(_kept(setup, name), _made_of(setup))
    return None if known is None else list(known["rows"])


def make(setup: Setup, name: str) -> None:
    """Make one example, and keep its numbers."""
    (scenario,) = (one for one in SCENARIOS if one.name == name)
    (setup.out / "fancy").mkdir(parents=True, exist_ok=True)
    keep_json(_kept(setup, name), {"rows": scenario.make(setup, scenario)}, _made_of(setup))


def _kept(setup: Setup, name: str) -> Path:
    return setup.out / "fancy" / f"{name}.json"


def _picture(setup: Setup, scenario: Scenario, network: str) -> Path:
    suffix = "" if network == scenario.network else f"-{network.lower()}"
    return setup.out / "fancy" / f"{scenario.name}{suffix}.png"


def _image(setup: Setup, index: int) -> tuple[Example, Tensor]:
    """One of the first images."""
    example = setup.example(index % setup.images)
    return example, example.image.to(find_device(setup.device))


def _absent(setup: Setup, victim: Any, example: Example, purpose: int) -> int:
    """A random object class that is not in the image."""
    assert example.mask is not None
    present = set(example.mask.flatten().tolist())
    free = [c for c in range(1, len(victim.classes or ())) if c not in present]
    return free[int(torch.randint(len(free), (), generator=generator_of(setup.seed, 3, purpose)))]


def _reach(setup: Setup, scenario: Scenario, victim: Any, image: Tensor, aim: Tensor) -> list[Row]:
    """Attack until the network sees a prescribed segmentation."""
    dag = DAG(goal="reach", max_iter=UPDATES, tolerance=ENOUGH, ignore_index=IGNORE)
    result = dag(victim, image[None], aim[None], aim[None])
    attacked = result.adversarial[0]
    return [_seen(setup, scenario, scenario.network, victim, image, attacked, aim, result)]


def _seen(
    setup: Setup,
    scenario: Scenario,
    name: str,
    victim: Any,
    image: Tensor,
    attacked: Tensor,
    aim: Tensor,
    result: Any,
) -> Row:
    size = (aim.shape[0], aim.shape[1])
    before, after = (predict(victim, x, size) for x in (image, attacked))
    assert isinstance(before, Tensor)
    assert isinstance(after, Tensor)
    share = float(after.eq(aim.cpu()).float().mean())
    path = _picture(setup, scenario, name)
    figures.attack_figure(
        path,
        image=image.cpu(),
        adversarial=attacked.cpu(),
        predicted=before,
        attacked=after,
        classes=victim.classes,
        note=f"{share:.1%} of the pixels as prescribed after {int(result.iterations[0])} updates",
    )
    return _row(scenario, name, result, share, path)


def _row(scenario: Scenario, name: str, result: Any, share: float, path: Path) -> Row:
    return {
        "example": scenario.title,
        "network": name,
        "as wanted, %": 100 * share,
        "updates": int(result.iterations[0]),
        "perceptibility": float(perceptibility(result.perturbation)[0]),
        "picture": path.name,
    }
