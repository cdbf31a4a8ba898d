from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support import SIMD_LEVELS, no_cuda

from dagcore.ops import native

if native.module is None:
    raise pytest.UsageError(
        "the tests need dagcore's native module, and it is not built: run `make test`, or "
        "`pip install --no-build-isolation -e '.[test]'`"
    )

WHY_NO_CUDA = no_cuda()
CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(WHY_NO_CUDA is not None, reason=WHY_NO_CUDA or "")
)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=[CUDA])
def cuda(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=[*(f"cpu-{level}" for level in SIMD_LEVELS), CUDA])
def kernels(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device, on the CPU once with the kernels of each SIMD level that the processor has."""
    name, _, level = request.param.partition("-")
    before, highest = native.module.simd_in_use(), native.module.simd_supported()
    if level and SIMD_LEVELS.index(level) > SIMD_LEVELS.index(highest):
        pytest.skip(f"this processor has no {level}, only {highest}")
    if level:
        native.module.use_simd(level)
        assert native.module.simd_in_use() == level
    yield torch.device(name)
    native.module.use_simd(before)


@pytest.fixture
def one_and_two_threads() -> Iterator[tuple[int, int]]:
    before = torch.get_num_threads()
    yield 1, 2
    torch.set_num_threads(before)


@pytest.fixture
def simd_levels() -> Iterator[tuple[str, ...]]:
    """The SIMD levels that this processor has."""
    before = native.module.simd_in_use()
    yield SIMD_LEVELS[: 1 + SIMD_LEVELS.index(native.module.simd_supported())]
    native.module.use_simd(before)
