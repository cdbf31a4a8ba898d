"""`dagcore.evaluate`: measure the robustness of a network with a named protocol."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ArgumentError, ArgumentTypeError
from ..victims.load import around
from .evaluator import Evaluation, EvaluationSettings
from .progress import ImageProgress, Silent
from .protocols import Protocol, find_protocol, radii_of
from .ranks import Ranks
from .sources import Examples
from .work import SourceFor, carry_out


def run_evaluation(settings: EvaluationSettings, progress: ImageProgress) -> int:
    """Evaluate a network on a data set. Results of an earlier run with the same settings are kept.

    Returns:
        The exit status: 0, or 128 + the number of the signal that stopped the evaluation.

    Raises:
        ValueError, TypeError, OSError, ImportError: if a setting is invalid. The message names the
            setting and the problem.
    """
    return carry_out(lambda ranks: Evaluation(settings, ranks, progress))


def evaluate(
    model: Any,
    dataset: Any,
    protocol: str | Path | Protocol = "sea-2024",
    *,
    out: str | Path,
    epsilon: float | Sequence[float] | None = None,
    progress: ImageProgress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Measure the robustness of a network with a named protocol, like `dagcore evaluate`.

    Results that an earlier call with the same arguments left in the folder are reused, so an
    interrupted call can be resumed. Under torchrun, all processes share the work.

    Args:
        model: name of a network (see `dagcore.victims.load`), or the network itself: a callable
            from images (N, 3, H, W) in [0, 1] to scores (N, C, *T), a `dagcore.victims.Victim` or
            a `Detector`. It is neither moved nor changed. Reports show its attribute `name`, or
            else the name of its class.
        dataset: "scenes", a folder (see `dagcore evaluate --data`), or a sequence of
            `dagcore.data.Example` or of pairs (image, truth). The image is floating point,
            (3, H, W) in [0, 1]. The truth is a label map (H, W) of integers, where 255 is ignored,
            or for detectors a mapping with "boxes" (K, 4) and "labels" (K,).
        protocol: name of a protocol, TOML file, or `Protocol`; see `dagcore.evaluation.protocols`.
        out: folder for the results; see `dagcore evaluate`.
        epsilon: radii to use instead of the protocol's, for images in [0, 1].
        progress: object that is told about every image. None shows nothing.
        settings: other fields of `EvaluationSettings`: `levels`, `images`, `slots`, `seed`, ...

    Returns:
        The content of summary.json: the scores of each attack and the worst case, in percent.

    Raises:
        TypeError, ValueError, OSError: if an argument is invalid. The message names it, what was
            required and what was given.
    """
    radii = None if epsilon is None else list(radii_of(epsilon))
    found = find_protocol(protocol)
    named = (str, Path)
    unused = [] if isinstance(model, named) else ["weights", "size"]
    unused += [] if isinstance(dataset, named) else ["labels", "set"]
    for name in settings:
        if name in unused:
            raise ArgumentError(f"{name} requires a network or a data set that is given by name")
    given = {**settings, "out": Path(out), "epsilon": radii, "protocol": found.name}
    others: dict[str, Any] = {}
    if isinstance(model, (str, Path)):
        given["model"] = str(model)
    else:
        if not callable(model):
            raise ArgumentTypeError(f"model must be a name or a callable, got {model!r}")
        others["victim"] = victim = around(model)
        given["model"] = str(getattr(model, "name", type(model).__name__))
        given.setdefault("device", str(next(victim.parameters(), torch.empty(0)).device))
    if isinstance(dataset, (str, Path)):
        given["data"] = str(dataset)
    else:
        given["data"] = type(dataset).__name__
        others["source_for"] = _source_for(dataset)

    def make(ranks: Ranks) -> Evaluation:
        return Evaluation(made, ranks, progress or Silent(), protocol=found, silent=True, **others)

    with _arguments_named():
        made = EvaluationSettings.of(given)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with _arguments_named():
            if carry_out(make):
                raise KeyboardInterrupt
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
    summary: dict[str, Any] = json.loads((Path(out) / "summary.json").read_text())
    return summary


@contextlib.contextmanager
def _arguments_named() -> Iterator[None]:
    """In errors, put the names of arguments in place of options: `out`, not `--out`."""

    def argument(option: re.Match[str]) -> str:
        return {"data": "dataset"}.get(option[1], option[1].replace("-", "_"))

    try:
        yield
    except (ArgumentError, ArgumentTypeError, OSError) as error:
        text = re.sub(r"(?<![\w-])--([a-z][a-z-]*)", argument, str(error))
        if len(error.args) != 1 or text == str(error):
            raise
        raise type(error)(text) from error


def _source_for(dataset: Any) -> SourceFor:
    is_sequence = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if isinstance(dataset, Mapping) or not is_sequence:
        raise ArgumentTypeError(
            "dataset must be a name, a folder or a sequence of examples, "
            f"got {type(dataset).__name__}"
        )
    if not len(dataset):
        raise ArgumentError("dataset must have at least one example, got none")
    return lambda settings, victim: Examples.of(dataset, victim, settings.images)
