"""Export the results of an evaluation in the formats of other projects."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from ...losses import UNTARGETED
from ..options import ATTACKS
from ..robustness import told_radius

SEMSEGBENCH_ATTACKS = ("pgd", "segpgd", "cospgd")

Summary = Mapping[str, Any]


def with_defaults(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings of a protocol's attack, including the attack's defaults."""
    known: dict[str, Any] = {}
    if entry["attack"] in ATTACKS:
        kind, _ = ATTACKS[entry["attack"]]
        known = {name: one.default for name, one in inspect.signature(kind).parameters.items()}
    return {**known, **entry["settings"]}


def entries_of(summary: Summary) -> dict[str, dict[str, Any]]:
    """Return the protocol's attacks for the task, by name."""
    return {
        entry["name"]: entry
        for entry in summary["protocol"]["attacks"]
        if entry["task"] in (None, summary["task"])
    }


def first_view(summary: Summary, kind: str) -> list[dict[str, Any]]:
    """Return results or worst cases in the protocol's view: in memory, if that was evaluated.

    Args:
        summary: summary of the evaluation.
        kind: "results" or "worst_case".
    """
    found: list[dict[str, Any]] = summary[kind]
    return [one for one in found if all(one[k] == found[0][k] for k in ("levels", "stage"))]


def model_info(summary: Summary) -> list[dict[str, Any]]:
    """Return one entry for each ball, in the format of RobustBench's model_info files.

    `clean_acc` is the aAcc on clean images. `autoattack_acc` is the worst-case aAcc over the
    attacks of this protocol, not AutoAttack's. Both are in percent of all pixels. `unreliable` is
    whether a check of the evaluation was flagged, or None without checks. Fields that only the
    network's authors can fill are empty.

    Returns:
        The entries. Empty for detectors and for attacks without a ball, which the format lacks.
    """
    verdicts = [check["verdict"] for check in summary.get("checks") or ()]
    return [
        {
            "link": "",
            "name": summary["network"],
            "authors": "",
            "additional_data": None,
            "number_forward_passes": 1,
            "dataset": summary["data"],
            "venue": "",
            "architecture": architecture_of(summary["network"])[0],
            "eps": told_radius({**one, "norm": "linf"}),
            "clean_acc": f"{summary['clean']['aAcc']:.2f}",
            "reported": "",
            "autoattack_acc": f"{one['aAcc']:.2f}",
            "footnote": f"Share of pixels, {summary['evaluated']} images. autoattack_acc is the "
            f"worst case for each image of the protocol {summary['protocol']['name']} "
            f"({', '.join(one['attacks'])}) in the norm {one['norm']}.",
            "unreliable": "flagged" in verdicts if verdicts else None,
        }
        for one in first_view(summary, "worst_case")
        if one["epsilon"] is not None and one["aAcc"] is not None
    ]


def semsegbench(summary: Summary) -> dict[str, Any]:
    """Return rows by data set, architecture and backbone, as in SemSegBench's attack_results.json.

    As there, epsilon is in units of 1/255, and alpha is the step for images in 0..1 divided by
    255: 3.92157e-05 is a step of 0.01. Times are left out.

    Returns:
        The rows of untargeted PGD, SegPGD and CosPGD. Empty for detectors, and if the protocol has
        none of these attacks.
    """
    entries = entries_of(summary)
    rows = []
    for one in first_view(summary, "results") if summary["task"] == "segmentation" else ():
        entry = entries[one["attack"]]
        if entry["attack"] in SEMSEGBENCH_ATTACKS and entry["adversarial"] == UNTARGETED:
            settings = with_defaults(entry)
            rows.append(
                {
                    "alpha": float(f"{settings['alpha'] / 255:.6g}"),
                    "epsilon": _units(one["epsilon"]),
                    "iterations": settings["steps"],
                    "name": entry["attack"],
                    "norm": one["norm"],
                    **{key: _rounded(one[key]) for key in ("aAcc", "mIoU", "mAcc")},
                }
            )
    architecture, backbone = architecture_of(summary["network"])
    return {summary["data"]: {architecture: {backbone: rows}}} if rows else {}


def _units(epsilon: float) -> float:
    """Return a radius in units of 1/255, as an integer if it is whole."""
    units = round(255 * epsilon, 6)
    return int(units) if units.is_integer() else units


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def architecture_of(network: str) -> tuple[str, str]:
    """Return architecture and backbone by a network's name. The backbone is "" if there is none."""
    named = re.fullmatch(r"([A-Za-z0-9]+)[-_]([\w*+-]+)", network)
    return (named[1], named[2]) if named else (network, "")
