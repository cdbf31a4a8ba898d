"""Why adversarial examples exist, as far as it can be measured: what networks do around images.

Along each image's own perturbation r, and along random directions of the same length, this measures
the lead of the true class, the steepness of the scores and the accuracy. It also measures what r
consists of, and whether it transfers to networks whose gradients point the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from .. import zoo
from ..engine import frozen, read_scores
from ..errors import ArgumentError
from ..evaluation.kept import keep_json, read_json
from ..evaluation.options import find_device
from ..evaluation.progress import Progress
from ..seeds import generator_of
from .cells import Cell, measure_cells
from .reports import Report, Row
from .work import IGNORE, Setup, make_perturbations, read, run, settings_of

NETWORKS = tuple(entry.name for entry in zoo.ENTRIES if entry.task == "segmentation")
MOST = 20  # maximum number of images
LENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0)  # factors on r
BINS = 16  # bins of the spectrum, from 0 to half a cycle per pixel


def why(setup: Setup, counter: Progress, networks: Sequence[str] = NETWORKS) -> Report:
    """Measure segmentation networks around images, along perturbations and random directions."""
    for name in networks:
        if zoo.find(name).task != "segmentation":
            raise ArgumentError(f"why needs segmentation networks, got {name}")
    attacks = {name: setup.attack(name) for name in networks}
    make_perturbations(setup, list(attacks.values()), counter)
    missing = [name for name in networks if known(setup, name, networks) is None]
    counter.add("why", len(networks), done=len(networks) - len(missing))
    for _ in run(setup, make, [(name, tuple(networks)) for name in missing]):
        counter.advance("why")
    cells = {(a, b): Cell(b, (attacks[a],)) for a in networks for b in networks if a != b}
    clean = {name: Cell(name) for name in networks}
    scores = measure_cells(setup, [*cells.values(), *clean.values()], counter, "why, transfer")
    rows = []
    for name in networks:
        row = known(setup, name, networks)
        assert row is not None
        left = {b: 100 * scores[cells[name, b]] / scores[clean[b]] for b in networks if b != name}
        pairs = [[other, cosine, left[other]] for other, cosine in row.pop("cosines")]
        rows.append({"network": name, **row, "transfer": pairs})
    return Report.of_rows(
        "why",
        rows,
        title="Why they exist",
        draw=partial(draw, rows=rows),
        pictures=[("why.png", "Around the images: along r, along random directions, and r itself")],
    )


def path_of(setup: Setup, network: str) -> Path:
    """Return the path of the file that keeps a network's row."""
    return setup.out / "why" / f"{zoo.find(network).slug}.json"


def made_of(setup: Setup, network: str, networks: Sequence[str]) -> dict[str, Any]:
    """Return all that a row depends on."""
    own = settings_of(setup, setup.attack(network))
    return {**own, **setup.made_with(networks), "images": min(setup.images, MOST)}


def known(setup: Setup, network: str, networks: Sequence[str]) -> Row | None:
    """Return the kept row, or None if there is none or it is out of date."""
    kept = read_json(path_of(setup, network), made_of(setup, network, networks))
    return None if kept is None else dict(kept["row"])


def make(setup: Setup, network: str, networks: Sequence[str]) -> None:
    """Measure one network around the images, and keep the row."""
    device = find_device(setup.device)
    victims = {name: setup.victim(name).to(device) for name in networks}
    own, attack = victims[network], setup.attack(network)
    examples = setup.examples("segmentation")
    seen: dict[str, list[Any]] = {}
    cosines: dict[str, list[float]] = {name: [] for name in networks if name != network}
    with frozen(nn.ModuleList(victims.values())):
        for k in range(min(setup.images, MOST)):
            example = examples[k]
            assert example.mask is not None
            image, labels = example.image[None].to(device), example.mask[None].to(device).long()
            r = read(setup, attack, k).values[None].to(device)
            generator = generator_of(setup.seed, 7, k)
            noise = torch.randn(r.shape, generator=generator).to(r)
            noise *= r.norm() / noise.norm()
            for name, direction in (("r", r), ("random", noise)):
                steps = [around(own, image + t * direction, labels) for t in LENGTHS]
                for j, what in enumerate(("gap", "steepness", "correct")):
                    seen.setdefault(f"{what} along {name}", []).append([one[j] for one in steps])
            outside = labels[0] == 0
            energy = r[0].square().sum(0)
            seen.setdefault("r outside objects, %", []).append(
                100 * float(energy[outside].sum() / energy.sum())
            )
            seen.setdefault("area outside objects, %", []).append(
                100 * float(outside.double().mean())
            )
            seen.setdefault("spectrum of r", []).append(spectrum(r[0]))
            seen.setdefault("spectrum of the image", []).append(spectrum(image[0]))
            gradient = steepest(own, image, labels)
            for name in cosines:
                other = steepest(victims[name], image, labels)
                cosines[name].append(float(F.cosine_similarity(gradient, other, dim=0)))
    mean = {name: averaged(values) for name, values in seen.items()}
    at = LENGTHS.index(1.0)
    row: Row = {
        "lead of the true class": mean["gap along r"][0],
        "lead at r": mean["gap along r"][at],
        "lead at noise as long": mean["gap along random"][at],
        "steepness": mean["steepness along r"][0],
        "steepness at r": mean["steepness along r"][at],
        "correct, %": mean["correct along r"][0],
        "correct at r, %": mean["correct along r"][at],
        "correct at noise as long, %": mean["correct along random"][at],
        "correct at noise 8 times as long, %": mean["correct along random"][-1],
        "r outside objects, %": mean["r outside objects, %"],
        "area outside objects, %": mean["area outside objects, %"],
        "r above a quarter cycle per pixel, %": sum(mean["spectrum of r"][BINS // 2 :]),
        "lengths": list(LENGTHS),
        **{name: values for name, values in mean.items() if isinstance(values, list)},
        "cosines": [[name, fmean(values)] for name, values in cosines.items()],
    }
    keep_json(path_of(setup, network), {"row": row}, made_of(setup, network, networks))


def averaged(values: Sequence[Any]) -> Any:
    """Return the mean of numbers, or the element-wise mean of lists."""
    if isinstance(values[0], float):
        return fmean(values)
    return [fmean(column) for column in zip(*values, strict=True)]


def scores_at(victim: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Return scores (1, C, H, W), enlarged to the pixels of the labels."""
    scores = read_scores(victim(images), images).as_subclass(Tensor)
    if scores.shape[2:] == labels.shape[1:]:
        return scores
    aligned = bool(getattr(victim, "align_corners", False))
    return F.interpolate(scores, labels.shape[1:], mode="bilinear", align_corners=aligned)


def around(victim: Any, images: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Return the true class's mean lead, the norm of its gradient, and the accuracy in percent."""
    leaf = images.detach().requires_grad_()
    counted = labels != IGNORE
    true = torch.where(counted, labels, 0)[:, None]
    with torch.enable_grad():
        scores = scores_at(victim, leaf, labels)
        own = scores.gather(1, true)
        others = scores.scatter(1, true, -torch.inf).amax(1, keepdim=True)
        lead = (own - others)[counted[:, None]]
        (gradient,) = torch.autograd.grad(lead.mean(), leaf)
    lead = lead.detach()
    correct = 100 * float((lead > 0).double().mean())
    return float(lead.mean()), float(gradient.norm()), correct


def steepest(victim: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of the cross-entropy at an image, flattened."""
    leaf = images.detach().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(scores_at(victim, leaf, labels), labels, ignore_index=IGNORE)
        (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient.flatten()


def spectrum(maps: Tensor) -> list[float]:
    """Return the energy of maps (3, H, W), without their mean, by spatial frequency in percent.

    There are `BINS` rings from 0 to half a cycle per pixel. Higher frequencies, in the corners, are
    counted in the last ring.
    """
    maps = maps - maps.mean((1, 2), keepdim=True)
    energy = torch.fft.fft2(maps.double()).abs().square().sum(0)
    rows, columns = (torch.fft.fftfreq(side, device=maps.device) for side in maps.shape[1:])
    radius = (rows[:, None].square() + columns.square()).sqrt()
    rings = (radius * 2 * BINS).long().clamp(max=BINS - 1)
    summed = energy.new_zeros(BINS).index_add_(0, rings.flatten(), energy.flatten())
    return [float(value) for value in 100 * summed / summed.sum()]


def draw(figure: Figure, rows: Sequence[Row]) -> None:
    """Plot leads, accuracy, spectra, and transfer over similarity of gradients."""
    leads, accuracy, spectra, transfer = figure.subplots(1, 4)
    for k, row in enumerate(rows):
        color = f"C{k}"
        leads.plot(row["lengths"][:7], row["gap along r"][:7], color=color, label=row["network"])
        leads.plot(row["lengths"][:7], row["gap along random"][:7], ":", color=color)
        accuracy.plot(row["lengths"], row["correct along r"], color=color)
        accuracy.plot(row["lengths"], row["correct along random"], ":", color=color)
        places = [(b + 0.5) / (2 * BINS) for b in range(BINS)]
        spectra.plot(places, row["spectrum of r"], color=color)
        spectra.plot(places, row["spectrum of the image"], ":", color=color)
        cosines, left = [pair[1] for pair in row["transfer"]], [pair[2] for pair in row["transfer"]]
        transfer.plot(cosines, left, "o", color=color, markersize=4)
    leads.axhline(0, color="0.7", linewidth=0.8)
    leads.set(xlabel="length, of r", ylabel="lead of the true class")
    accuracy.set(xlabel="length, of r", ylabel="correct, %")
    spectra.set(xlabel="cycles per pixel", ylabel="energy, %", yscale="log")
    transfer.set(xlabel="cosine of the gradients", ylabel="score left by the other's r, %")
    leads.legend(fontsize=5)
    accuracy.set_title("dotted: random directions", fontsize=7)
    spectra.set_title("dotted: of the image", fontsize=7)
