from __future__ import annotations

import contextlib
from collections.abc import Iterator

import cuda_on_host
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

WHY_NOT_ON_HOST = cuda_on_host.why_not()
ON_HOST = [
    pytest.param(
        f"cuda-on-host-{order}",
        marks=pytest.mark.skipif(WHY_NOT_ON_HOST is not None, reason=WHY_NOT_ON_HOST or ""),
    )
    for order in cuda_on_host.ORDERS
]


@contextlib.contextmanager
def kernels_named(name: str) -> Iterator[torch.device]:
    """The device that tensors must be on to come to the kernels of that name."""
    before, highest = native.module.simd_in_use(), native.module.simd_supported()
    kind, _, level = name.rpartition("-")
    if kind == "cuda-on-host":
        with cuda_on_host.running(level):
            yield torch.device("cpu")
    elif kind == "cpu":
        if SIMD_LEVELS.index(level) > SIMD_LEVELS.index(highest):
            pytest.skip(f"this processor has no {level}, only {highest}")
        native.module.use_simd(level)
        assert native.module.simd_in_use() == level
        yield torch.device("cpu")
        native.module.use_simd(before)
    else:
        yield torch.device(name)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests that are marked cuda_on_host with the CUDA kernels on the host, too."""
    if "device" in metafunc.fixturenames:
        marked = metafunc.definition.get_closest_marker("cuda_on_host")
        on_host = ON_HOST[:1] if marked else []
        metafunc.parametrize("device", ["cpu", *on_host, CUDA], indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with kernels_named(request.param) as device:
        yield device


@pytest.fixture(params=[CUDA])
def cuda(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=[*(f"cpu-{level}" for level in SIMD_LEVELS), *ON_HOST, CUDA])
def kernels(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device: the CPU with the kernels of each SIMD level, and with CUDA's in every order."""
    with kernels_named(request.param) as device:
        yield device


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
