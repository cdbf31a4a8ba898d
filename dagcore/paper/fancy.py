"""The paper's fancy examples: painted segmentations, several networks fooled at once, noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attacks import DAG, Part, Result, joint_attack
from ..data import Example
from ..errors import ArgumentError
from ..evaluation.figures import attack_figure
from ..evaluation.kept import keep_json, read_json
from ..evaluation.options import find_device
from ..evaluation.predict import predict
from ..evaluation.progress import Progress
from ..labels import assign, paint, pattern
from ..perturbation import perceptibility
from ..seeds import generator_of
from ..victims import Detector, Victim, prepare
from .reports import Report, Row
from .work import IGNORE, Setup, run

NETWORKS = ("FCN-Alex", "FCN-VGG")
DETECTOR = "FR-VGG-07"
PATTERNS = ("circle", "square", "stripes", "text:AI")  # few letters: score maps are coarse
BACKGROUND = 0
UPDATES = 600  # a prescribed segmentation takes more of them than leaving the true one
ENOUGH = 0.01  # of the pixels may miss a prescribed mask, as in the authors' released code

Aims = Callable[[Setup, Example, Sequence[Any]], "tuple[Tensor, list[Part]]"]
"""The image (3, H, W) of an example, and what the attack on each victim aims at."""


@dataclasses.dataclass(frozen=True)
class Scenario:
    """One example: what its files are called, which networks see which image, and as what."""

    name: str
    title: str
    networks: tuple[str, ...]
    image: int
    aims: Aims
    goal: str = "reach"

    def picture(self, network: str) -> str:
        """The path of a network's picture within the folder of results."""
        suffix = "" if len(self.networks) == 1 else f"-{network.lower()}"
        return f"fancy/{self.name}{suffix}.png"


def painted(
    setup: Setup,
    example: Example,
    victims: Sequence[Victim],
    *,
    patterns: Sequence[str],
    purpose: int,
) -> tuple[Tensor, list[Part]]:
    """Each network sees a pattern of a class that is not in the image, background around it."""
    parts = []
    for k, (victim, what) in enumerate(zip(victims, patterns, strict=True)):
        inside = _absent(setup, victim, example, purpose + k)
        parts.append(_prescribed(setup, victim, example.image, what, inside))
    return example.image, parts


def noise(setup: Setup, example: Example, victims: Sequence[Victim]) -> tuple[Tensor, list[Part]]:
    """An image without content that a network segments as a chosen object (the slides' type 2)."""
    (victim,), generator = victims, generator_of(setup.seed, 2, 0)
    image = torch.rand(example.image.shape, generator=generator)
    chosen = 1 + int(torch.randint(len(victim.classes or ()) - 1, (), generator=generator))
    return image, [_prescribed(setup, victim, image, "circle", chosen)]


def two_tasks(setup: Setup, example: Example, victims: Sequence[Any]) -> tuple[Tensor, list[Part]]:
    """A segmentation network and a detector are both to leave the truth."""
    (segmenter, detector), generator = victims, generator_of(setup.seed, 2, 3)
    assert isinstance(detector, Detector)
    assert example.mask is not None
    device = find_device(setup.device)
    labels = example.mask[None].to(device).long()
    aim = assign("permutation", labels, len(segmenter.classes or ()), IGNORE, generator)
    image = example.image[None].to(device)
    found = detector.dense_targets(image, [example], generator=generator)
    if not bool((found.labels != found.adversarial_labels).any()):
        raise ArgumentError(f"two-tasks: {DETECTOR} finds no targets in {example.key}")
    return example.image, [
        Part(segmenter, labels, aim),
        Part(detector, found.labels, found.adversarial_labels, boxes=found.boxes),
    ]


SCENARIOS = (
    *(
        Scenario(
            f"{what.partition(':')[0]}-{name.lower()}",
            f"{what.partition(':')[0]}, prescribed to {name}",
            (name,),
            k,
            partial(painted, patterns=(what,), purpose=k),
        )
        for k, what in enumerate(PATTERNS)
        for name in NETWORKS
    ),
    Scenario(
        "two-masks",
        "one image, two prescribed segmentations",
        NETWORKS,
        4,
        partial(painted, patterns=("circle", "stripes"), purpose=10),
    ),
    Scenario(
        "two-tasks",
        "one image that fools a segmenter and a detector",
        ("FCN-VGG", DETECTOR),
        3,
        two_tasks,
        "leave",
    ),
    Scenario("noise", "noise, prescribed to be an object", ("FCN-VGG",), 0, noise),
)


def fancy(
    setup: Setup,
    counter: Progress,
    networks: Sequence[str] = (),
    *,
    scenarios: Sequence[Scenario] = SCENARIOS,
) -> Report:
    """Make the examples that are not there yet; a row and a picture for each network of each."""
    if networks:
        raise ArgumentError(f"fancy has networks of its own, got {', '.join(networks)}")
    missing = [scenario for scenario in scenarios if _known(setup, scenario) is None]
    counter.add("fancy examples", len(scenarios), done=len(scenarios) - len(missing))
    for _ in run(setup, make, [(scenario,) for scenario in missing]):
        counter.advance("fancy examples")
    rows = [row for scenario in scenarios for row in _known(setup, scenario) or []]
    pictures = [
        (
            f"fancy/{row['picture']}",
            f"{row['example']}: {row['network']}, {row['as wanted, %']:.1f} % as wanted after "
            f"{row['updates']} updates",
        )
        for row in rows
    ]
    return Report.of_rows("fancy", rows, "picture", title="Fancy examples", pictures=pictures)


def _kept(setup: Setup, scenario: Scenario) -> Path:
    return setup.out / "fancy" / f"{scenario.name}.json"


def _made_of(setup: Setup) -> dict[str, Any]:
    """What the examples follow from."""
    return {
        **setup.made_with([*NETWORKS, DETECTOR]),
        "images": setup.images,
        "updates": setup.max_iter or UPDATES,
        "tolerance": ENOUGH,
    }


def _known(setup: Setup, scenario: Scenario) -> list[Row] | None:
    """The rows of an example that is kept, if they still follow from what there is."""
    known = read_json(_kept(setup, scenario), _made_of(setup))
    return None if known is None else list(known["rows"])


def make(setup: Setup, scenario: Scenario) -> None:
    """Make one example, draw it as each network sees it, and keep its numbers."""
    device = find_device(setup.device)
    example = setup.example(scenario.image % setup.images)
    victims = [setup.victim(name) for name in scenario.networks]
    image, parts = scenario.aims(setup, example, victims)
    reach = scenario.goal == "reach"
    dag = DAG(
        goal=scenario.goal,
        max_iter=setup.max_iter or UPDATES,
        tolerance=ENOUGH if reach else 0.0,
        ignore_index=IGNORE,
    )
    result = joint_attack(dag, parts, image[None].to(device))
    rows = []
    for k, (name, part) in enumerate(zip(scenario.networks, parts, strict=True)):
        path = setup.out / scenario.picture(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        share = seen(path, part, image.to(device), result, k, reach=reach)
        rows.append(
            {
                "example": scenario.title,
                "network": name,
                "as wanted, %": 100 * share,
                "updates": int(result.iterations[0]),
                "perceptibility": float(perceptibility(result.perturbation)[0]),
                "picture": path.name,
            }
        )
    keep_json(_kept(setup, scenario), {"rows": rows}, _made_of(setup))


def seen(path: Path, part: Part, image: Tensor, result: Result, k: int, *, reach: bool) -> float:
    """Draw what network `k` sees before and after the attack; the share that is as wanted."""
    victim: Any = part.model
    size = (image.shape[1], image.shape[2])
    before, after = (predict(victim, x, size) for x in (image, result.adversarial[0]))
    if reach:
        assert isinstance(after, Tensor)
        assert isinstance(part.labels, Tensor)
        share = float(after.eq(part.labels[0].cpu()).float().mean())
        note = f"{share:.1%} of the pixels as prescribed after {int(result.iterations[0])} updates"
    else:
        left = int(result.active[int(result.iterations[0]), k, 0])
        share, note = 1 - left / int(result.targets[k, 0]), ""
    attack_figure(
        path,
        image=image,
        adversarial=result.adversarial[0],
        predicted=before,
        attacked=after,
        classes=victim.classes,
        note=note,
    )
    return share


def _prescribed(setup: Setup, victim: Any, image: Tensor, what: str, inside: int) -> Part:
    """A segmentation of a pattern, as what a network is to see."""
    aim = paint(pattern(what, *image.shape[1:]), inside, BACKGROUND)[None]
    aim = aim.to(find_device(setup.device))
    return Part(prepare(victim), aim, aim)


def _absent(setup: Setup, victim: Any, example: Example, purpose: int) -> int:
    """A random object class that is not in the image."""
    assert example.mask is not None
    present = set(example.mask.flatten().tolist())
    free = [c for c in range(1, len(victim.classes or ())) if c not in present]
    return free[int(torch.randint(len(free), (), generator=generator_of(setup.seed, 3, purpose)))]
