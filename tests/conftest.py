from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import Any

import cuda_on_host
import fuzzing  # noqa: F401  which registers the profiles
import pytest
import torch
from hypothesis import settings
from support import SIMD_LEVELS, no_cuda

from dagcore.ops import native

if native.module is None:
    raise pytest.UsageError(
        "the tests need dagcore's native module, and it is not built: run `make test`, or "
        "`pip install --no-build-isolation -e '.[test]'`"
    )

# xdist's workers share the cores: a thread that waits must not spin (twenty times slower).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # as many threads in all as there would be
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # for the tests' own processes
# These run first, so that no worker begins with a long test when the others are done.
SLOW = (
    "test_zoo_training.py",
    "test_paper.py",
    "test_paper_defence.py",
    "test_examples.py",
    "test_docs.py",
    "test_run_killed.py",
    "test_evaluate_killed.py",
    "test_processes.py",
    "test_zoo.py",
)

settings.load_profile("quick")  # unless --hypothesis-profile names another

WHY_NO_CUDA = no_cuda()
CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(WHY_NO_CUDA is not None, reason=WHY_NO_CUDA or "")
)

try:
    WHY_NOT_ON_HOST = cuda_on_host.why_not()
except RuntimeError as error:
    raise pytest.UsageError(str(error)) from None


def on_host(order: str) -> Any:
    """A parameter: the CUDA kernels compiled for the host, with threads in that order."""
    missing = pytest.mark.skipif(WHY_NOT_ON_HOST is not None, reason=WHY_NOT_ON_HOST or "")
    return pytest.param(f"cuda-on-host-{order}", marks=missing)


@contextlib.contextmanager
def kernels_named(name: str) -> Iterator[torch.device]:
    """The device that tensors must be on to come to the kernels of that name."""
    before, highest = native.module.simd_in_use(), native.module.simd_supported()
    kind, _, level = name.rpartition("-")
    if not kind:
        yield torch.device(name)
    elif kind == "cuda-on-host":
        with cuda_on_host.running(level):
            yield torch.device("cpu")
    else:
        if SIMD_LEVELS.index(level) > SIMD_LEVELS.index(highest):
            pytest.skip(f"this processor has no {level}, only {highest}")
        native.module.use_simd(level)
        assert native.module.simd_in_use() == level
        yield torch.device("cpu")
        native.module.use_simd(before)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-order",
        action="store_true",
        help="run the CUDA kernels on the host with threads in every order, not in random order",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in SLOW)
    gc.freeze()  # thousands of tests, which no collection need look at again


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    every = metafunc.config.getoption("every_order")
    host = [on_host(order) for order in (cuda_on_host.ORDERS if every else ("random",))]
    mark = metafunc.definition.get_closest_marker("cuda_on_host")
    seldom = mark is not None and mark.args == ("every-order",)
    wanted = None if mark is None else mark.args != (False,) and (every or not seldom)
    names = {
        "kernels": [
            *(f"cpu-{level}" for level in SIMD_LEVELS),
            *host * (wanted is not False),
            CUDA,
        ],
        "device": ["cpu", *host * (wanted is True), CUDA],
        "cpu_or_cuda_on_host": ["cpu", *host],
        "order": [on_host(order) for order in cuda_on_host.ORDERS],
        "usual_order": host,
    }
    for fixture in names.keys() & set(metafunc.fixturenames):
        metafunc.parametrize(fixture, names[fixture], indirect=True)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tests that draw from torch's own generator draw the same in every run."""
    torch.manual_seed(0)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where tensors are; with the mark cuda_on_host, the CPU with the kernels of CUDA too."""
    with kernels_named(request.param) as device:
        yield device


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where tensors are: the CPU with the kernels of each SIMD level and, unless the mark
    cuda_on_host(False) says that these would take long, with the kernels of CUDA."""
    with kernels_named(request.param) as device:
        yield device


@pytest.fixture
def cpu_or_cuda_on_host(request: pytest.FixtureRequest) -> Iterator[None]:
    """For tensors on the CPU, either its own kernels or those of CUDA."""
    with kernels_named(request.param):
        yield


@pytest.fixture
def order(request: pytest.FixtureRequest) -> str:
    """An order of threads that the CUDA kernels can run in on the host."""
    return str(request.param).rpartition("-")[2]


@pytest.fixture
def usual_order(request: pytest.FixtureRequest) -> str:
    """The random order, which a run tests; with --every-order each of them."""
    return str(request.param).rpartition("-")[2]


@pytest.fixture(params=[CUDA])
def cuda(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


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
