"""The paper's fancy examples: painted segmentations, several networks fooled at once, noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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
from ..victims import prepare
from .reports import Report, Row
from .work import IGNORE, Setup, run

NETWORKS = ("FCN-Alex", "FCN-VGG")
DETECTOR = "FR-VGG-07"
PATTERNS = ("circle", "square", "stripes", "text:AI")  # few letters, as score maps are coarse
BACKGROUND = 0
UPDATES = 600  # reaching a prescribed segmentation takes more updates than leaving the true one
ENOUGH = 0.01  # fraction of the pixels that may miss a prescribed mask, as in the authors' code


@dataclasses.dataclass(frozen=True)
class Scenario:
    """An example: networks, an image, and what each network is to see in it."""

    name: str
    """Name of its files."""
    title: str
    networks: tuple[str, ...]
    image: int
    """Index of the image."""
    patterns: tuple[str, ...] = ()
    """Pattern that each network is to see; none: anything but the truth."""
    noise: bool = False
    """Whether noise replaces the image."""

    def picture(self, network: str) -> str:
        """Return the path of a network's picture within the folder of results."""
        suffix = "" if len(self.networks) == 1 else f"-{network.lower()}"
        return f"fancy/{self.name}{suffix}.png"


SCENARIOS = (
    *(
        Scenario(
            f"{what.partition(':')[0]}-{name.lower()}",
            f"{what.partition(':')[0]}, prescribed to {name}",
            (name,),
            k,
            (what,),
        )
        for k, what in enumerate(PATTERNS)
        for name in NETWORKS
    ),
    Scenario(
        "two-masks",
        "one image, two prescribed segmentations",
        NETWORKS,
        4,
        ("circle", "stripes"),
    ),
    Scenario(
        "two-tasks", "one image that fools a segmenter and a detector", ("FCN-VGG", DETECTOR), 3
    ),
    Scenario(
        "noise", "noise, prescribed to be an object", ("FCN-VGG",), 0, ("circle",), noise=True
    ),
)


def fancy(
    setup: Setup,
    counter: Progress,
    networks: Sequence[str] = (),
    *,
    scenarios: Sequence[Scenario] = SCENARIOS,
) -> Report:
    """Make the examples that are missing, and report a row and a picture per example and network.

    Raises:
        ValueError: if networks are given, since the examples have their own.
    """
    if networks:
        raise ArgumentError(f"fancy takes no networks, it has its own, got {', '.join(networks)}")
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


def _updates(setup: Setup) -> int:
    return setup.max_iter or UPDATES


def _kept(setup: Setup, scenario: Scenario) -> Path:
    return setup.out / "fancy" / f"{scenario.name}.json"


def _made_of(setup: Setup) -> dict[str, Any]:
    """Return all that the examples depend on."""
    return {
        **setup.made_with([*NETWORKS, DETECTOR]),
        "images": setup.images,
        "updates": _updates(setup),
        "tolerance": ENOUGH,
    }


def _known(setup: Setup, scenario: Scenario) -> list[Row] | None:
    """Return the kept rows of an example, or None if there are none or they are out of date."""
    known = read_json(_kept(setup, scenario), _made_of(setup))
    return None if known is None else list(known["rows"])


def make(setup: Setup, scenario: Scenario) -> None:
    """Make an example, draw each network's predictions, and keep the numbers."""
    example = setup.example(scenario.image % setup.images)
    generator = generator_of(setup.seed, 2, scenario.image)
    shape = example.image.shape
    image = torch.rand(shape, generator=generator) if scenario.noise else example.image
    example = dataclasses.replace(example, image=image.to(find_device(setup.device)))
    victims = [setup.victim(name) for name in scenario.networks]
    if scenario.patterns:
        parts = prescribed(setup, scenario, example, victims, generator)
        dag = DAG(goal="reach", max_iter=_updates(setup), tolerance=ENOUGH, ignore_index=IGNORE)
    else:
        parts = untrue(example, victims, generator)
        dag = DAG(max_iter=_updates(setup), ignore_index=IGNORE)
    result = joint_attack(dag, parts, example.image[None])
    rows = []
    for k, (name, part) in enumerate(zip(scenario.networks, parts, strict=True)):
        path = setup.out / scenario.picture(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        share = seen(path, part, example.image, result, k, reach=bool(scenario.patterns))
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


def prescribed(
    setup: Setup,
    scenario: Scenario,
    example: Example,
    victims: Sequence[Any],
    generator: torch.Generator,
) -> list[Part]:
    """Return a part for each network: it is to see a pattern of a class that the image lacks.

    The background surrounds the pattern. In noise the pattern may have any object class (the
    slides' type 2).
    """
    assert example.mask is not None
    parts = []
    for k, (victim, what) in enumerate(zip(victims, scenario.patterns, strict=True)):
        free = list(range(1, len(victim.classes)))
        if not scenario.noise:
            present = set(example.mask.flatten().tolist())
            free = [c for c in free if c not in present]
            purpose = scenario.image if len(victims) == 1 else 10 + k  # different from any image
            generator = generator_of(setup.seed, 3, purpose)
        inside = free[int(torch.randint(len(free), (), generator=generator))]
        aim = paint(pattern(what, *example.image.shape[1:]), inside, BACKGROUND)[None]
        aim = aim.to(example.image.device)
        parts.append(Part(prepare(victim), aim, aim))
    return parts


def untrue(example: Example, victims: Sequence[Any], generator: torch.Generator) -> list[Part]:
    """Return the parts for a segmentation network and a detector, both to leave the truth."""
    segmenter, detector = victims
    assert example.mask is not None
    labels = example.mask[None].to(example.image.device).long()
    aim = assign("permutation", labels, len(segmenter.classes), IGNORE, generator)
    found = detector.dense_targets(example.image[None], [example], generator=generator)
    return [
        Part(segmenter, labels, aim),
        Part(detector, found.labels, found.adversarial_labels, boxes=found.boxes),
    ]


def seen(path: Path, part: Part, image: Tensor, result: Result, k: int, *, reach: bool) -> float:
    """Draw what network `k` sees before and after the attack; return the fraction as wanted."""
    victim: Any = part.model
    size = (image.shape[1], image.shape[2])
    before, after = (predict(victim, x, size) for x in (image, result.adversarial[0]))
    if reach:
        assert isinstance(after, Tensor)
        assert isinstance(part.labels, Tensor)
        share = float(after.eq(part.labels[0].cpu()).float().mean())
        note = f"{share:.1%} of the pixels as prescribed after {int(result.iterations[0])} updates"
    else:
        left, total = int(result.active[result.iterations[0], k, 0]), int(result.targets[k, 0])
        if not total:
            raise ArgumentError(f"{path.stem}: there are no targets in the image")
        share, note = 1 - left / total, ""
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
