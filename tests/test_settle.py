"""`settle_`: what an evaluation and a step change in the rows of images under attack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import opcheck
from torch import Tensor

from dagcore import ops
from dagcore.ops import fallback
from dagcore.ops.fallback import BUDGET, CONVERGED, STALLED

WRITTEN = ("running", "may_move", "updates", "stuck", "status", "history")


def rows(**changes: Any) -> dict[str, Any]:
    """One image that runs, after 2 of at most 5 updates, wanted and moved: nothing stops it."""
    values: dict[str, Any] = {
        "running": True,
        "may_move": True,
        "updates": 2,
        "stuck": 0,
        "status": -1,
        "history": [[7], [6], [-1], [-1], [-1], [-1]],
        "active": [4],
        "wanted": True,
        "moved": True,
        "done": False,
    } | changes
    dtypes = {"updates": torch.int64, "stuck": torch.int64, "status": torch.int8}
    dtypes |= {"history": torch.int32, "active": torch.int32}
    tensors = {
        name: None if value is None else torch.tensor([value], dtype=dtypes.get(name, torch.bool))
        for name, value in values.items()
    }
    return tensors | {"max_iter": 5, "patience": 2}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "goes on": ({}, {"updates": 3, "history": [[7], [6], [4], [-1], [-1], [-1]]}, 4),
    "converged": (
        {"wanted": False, "moved": False, "done": None, "active": [0]},
        {
            "running": False,
            "may_move": False,
            "status": CONVERGED,
            "history": [[7], [6], [0], [-1], [-1], [-1]],
        },
        0,
    ),
    "done though a step was wanted": (
        {"done": True},
        {
            "running": False,
            "may_move": False,
            "status": CONVERGED,
            "updates": 3,
            "history": [[7], [6], [4], [-1], [-1], [-1]],
        },
        4,
    ),
    "the last update": (
        {"updates": 4},
        {"updates": 5, "may_move": False, "history": [[7], [6], [-1], [-1], [4], [-1]]},
        4,
    ),
    "no budget left": (
        {"updates": 5, "may_move": False, "moved": False},
        {
            "running": False,
            "may_move": False,
            "status": BUDGET,
            "history": [[7], [6], [-1], [-1], [-1], [4]],
        },
        4,
    ),
    "not moved once": (
        {"moved": False},
        {"stuck": 1, "history": [[7], [6], [4], [-1], [-1], [-1]]},
        4,
    ),
    "not moved twice": (
        {"moved": False, "stuck": 1},
        {
            "stuck": 2,
            "running": False,
            "may_move": False,
            "status": STALLED,
            "history": [[7], [6], [4], [-1], [-1], [-1]],
        },
        4,
    ),
    "moved again": (
        {"stuck": 1},
        {"stuck": 0, "updates": 3, "history": [[7], [6], [4], [-1], [-1], [-1]]},
        4,
    ),
    "stopped before": (
        {"running": False, "may_move": False, "status": BUDGET, "moved": False},
        {},
        -1,
    ),
}


@pytest.mark.parametrize("kernel", [ops.settle_, fallback.settle_], ids=["op", "fallback"])
@pytest.mark.parametrize("name", CASES)
def test_one_image(kernel: Any, name: str) -> None:
    given, changed, counted = CASES[name]
    got, expected = rows(**given), rows(**(given | changed))
    counts = kernel(**got)
    assert counts.tolist() == [[counted]]
    assert counts.dtype == torch.int32
    for n in WRITTEN:
        assert torch.equal(got[n], expected[n]), n


def many(images: int, networks: int, rng: torch.Generator) -> dict[str, Any]:
    """Images in any state at all."""

    def flags(share: float) -> Tensor:
        return torch.rand(images, generator=rng) < share

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=rng)

    max_iter = 4
    return {
        "running": flags(0.7),
        "may_move": flags(0.5),
        "updates": integers(max_iter + 1, images),
        "stuck": integers(4, images),
        "status": integers(3, images).to(torch.int8),
        "history": integers(9, images, max_iter + 1, networks).int(),
        "active": integers(9, images, networks).int() - 1,
        "wanted": flags(0.7),
        "moved": flags(0.6),
        "done": flags(0.3),
        "max_iter": max_iter,
        "patience": 3,
    }


@pytest.mark.cuda_on_host
@pytest.mark.parametrize("networks", [1, 3])
@pytest.mark.parametrize("images", [0, 1, 200])
@pytest.mark.parametrize("ready", ["done", "not wanted"])
def test_equals_the_fallback(device: torch.device, images: int, networks: int, ready: str) -> None:
    for seed in range(5):
        given = many(images, networks, torch.Generator().manual_seed(seed))
        if ready == "not wanted":
            given["done"] = None
        expected = {n: v.clone() if isinstance(v, Tensor) else v for n, v in given.items()}
        there = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in given.items()}
        counts, expected_counts = ops.settle_(**there), fallback.settle_(**expected)
        assert torch.equal(counts.cpu(), expected_counts)
        for name in WRITTEN:
            assert torch.equal(there[name].cpu(), expected[name]), name


@pytest.mark.cuda_on_host
def test_opcheck(device: torch.device) -> None:
    given = many(6, 2, torch.Generator().manual_seed(0))
    arguments = tuple(v.to(device) if isinstance(v, Tensor) else v for v in given.values())
    opcheck("settle_", arguments)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("updates", torch.zeros(2, dtype=torch.int64)),
        ("status", torch.zeros(1, dtype=torch.int32)),
        ("history", torch.zeros(1, 5, 1, dtype=torch.int32)),
        ("active", torch.zeros(1, dtype=torch.int32)),
        ("moved", torch.zeros(1, dtype=torch.uint8)),
    ],
)
def test_wrong_rows_are_refused(name: str, wrong: Tensor) -> None:
    given = rows() | {name: wrong}
    with pytest.raises(RuntimeError, match=name if name != "active" else "history"):
        ops.settle_(**given)
