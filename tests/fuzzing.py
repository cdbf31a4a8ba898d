"""What the tests on generated input share: how many, from which seeds, and what is no argument."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from support import DTYPES, INF, LABEL_DTYPES, NAN
from torch import Tensor

QUICK = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile("quick", QUICK)
settings.register_profile("thorough", QUICK, max_examples=3000, derandomize=False, print_blob=True)
SEEDS = st.integers(0, 2**31)
ANYTHING: tuple[Any, ...] = (
    None,
    True,
    0,
    1,
    -1,
    2**63,
    -(2**63) - 1,
    10**400,
    0.5,
    0.0,
    -1.0,
    1e300,
    5e-324,
    NAN,
    INF,
    -INF,
    1j,
    "",
    "leave",
    "reach",
    "runner-up",
    "permutation",
    b"leave",
    (),
    (3, 4),
    [3, 4],
    (3, -4),
    (3, 2**40),
    (3.0, 4),
    (3, None),
    (True, 4),
    {},
    object(),
    np.zeros((2, 3)),
    np.float32(0.5),
    np.array(["leave", "reach"]),
    torch.Size([3, 4]),
    torch.float32,
)


def one_in(draw: st.DrawFn, count: int) -> bool:
    return draw(st.integers(1, count)) == count


def negated(values: Tensor) -> Tensor:
    """The same values as a view that negates what is in memory."""
    return torch._neg_view(-values)


def strange_tensors(like: Tensor) -> list[Any]:
    """Tensors that differ from one in shape, dtype or kind."""
    more = like.new_zeros((*like.shape, 2))
    found = [
        more,
        like.new_zeros(()),
        like.new_zeros((*like.shape[:-1], 9)),
        like.new_zeros((9, *like.shape[1:])),
        like.new_zeros((0, *like.shape[1:])),
        like.new_zeros((*like.shape[:-1], 0)),
        like.new_zeros((*like.shape, *[2] * 17)[-20:]) if like.dim() < 2 else like,
        torch.zeros(like.shape, device="meta", dtype=like.dtype),
        torch.zeros(like.shape, dtype=like.dtype).to_sparse(),
        torch.zeros(like.shape).to_mkldnn() if like.numel() and like.dim() else like,
        torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
    ]
    kinds = (torch.bool, torch.int8, torch.int16, torch.complex64, torch.float8_e4m3fn)
    if like.is_floating_point():
        found.append(negated(like))
    if like.numel() > 5:
        found.append(like.flatten().unfold(0, 4, 2))
    found += [torch.zeros(like.shape, dtype=kind) for kind in (*kinds, *DTYPES, *LABEL_DTYPES)]
    return found
