"""The CUDA kernels on the host: faults that the scheduler finds, and kernels against the CPU's.

More of the ops' tests run there too, see `cuda_on_host` in conftest.py.
"""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path

import cuda_on_host
import pytest
import torch
from every_kernel import assert_same_results, in_every_case, results
from support import random_case

from dagcore import ops

CPU = torch.device("cpu")


@in_every_case
def test_kernels(
    usual_order: str, layout: str, mode: str, dtype: torch.dtype, size: tuple[int, int]
) -> None:
    case = (CPU, layout, mode, dtype, size)
    expected = results(*case)
    with cuda_on_host.running(usual_order):
        assert_same_results(results(*case), expected)


def test_the_ops_launch_the_cuda_kernels(order: str) -> None:
    scores, labels, adversarial = random_case((1, 3, 5, 5), 0)
    images, active = torch.rand(1, 4), torch.ones(1, dtype=torch.int32)
    numbers = [torch.zeros(1, dtype=dtype) for dtype in (torch.int64, torch.int64, torch.int8)]
    yes, history = torch.ones(1, dtype=torch.bool), torch.zeros(1, 2, 1, dtype=torch.int32)
    rows = (yes.clone(), yes.clone(), *numbers, history, history[:, 0].clone(), yes, yes, None)
    free = {"lower": None, "upper": None, "epsilon": None}
    sign = {"norm": "linf", "alpha": 0.1}
    prox = {"alpha": torch.ones(1, dtype=torch.float64), "lower": None, "upper": None}
    l2 = {"norm": "l2", "alpha": 0.1, "momentum": torch.zeros(1, 4)}
    for count, call in (
        (1, lambda: ops.dag_seed(scores, labels, adversarial)),
        (2, lambda: ops.dag_seed_bilinear(scores, labels, adversarial)),
        (1, lambda: ops.argmax_bilinear(scores, (9, 9))),
        (2, lambda: ops.loss_seed(scores, labels, loss="cosine")),
        (6, lambda: ops.loss_seed_bilinear(scores[..., :3], labels, loss="cosine")),
        (2, lambda: ops.linf_step_(images, images, images, active, gamma=0.1, **free)),
        (2, lambda: ops.pgd_step_(images, images, images, active, **free, **sign)),
        (4, lambda: ops.pgd_step_(images, images, images, active, **free, **l2)),
        (10, lambda: ops.linf_prox_(images, images, images, images, active, **prox)),
        (1, lambda: ops.settle_(*rows, 1, 1)),
    ):
        with cuda_on_host.running(order) as launches:
            before = launches()
            call()
            assert launches() == before + count
        call()
        assert launches() == before + count


# What cuda_on_host/misuse.cu does wrong: the message, and the call or the words of the line.
UNEQUAL = "lanes of one mask wait at different calls"
UNWRITTEN = "shared memory is read that nobody has written"
MISUSE = {
    "different_calls": (f"{UNEQUAL}, another one at .*misuse.cu:", "__any_sync|__ballot_sync"),
    "different_lines": (f"{UNEQUAL}, another one at .*misuse.cu:", "__syncwarp"),
    "different_barriers": ("threads wait at different barriers", "__syncthreads"),
    "ended_lane": ("the mask names a lane that has ended", "__any_sync"),
    "missing_lane": ("the mask names a lane that the block does not have", "__any_sync"),
    "not_in_its_mask": ("a thread calls that its mask does not name", "__any_sync"),
    "reads_outside_the_mask": ("a lane is read that the mask does not name", "__shfl_sync"),
    "barrier_after_an_end": ("a barrier after 1 threads have ended", "__syncthreads"),
    "deadlock": ("deadlock: 2 threads of the block wait at __syncthreads", "__syncwarp"),
    "no_barrier": (f"{UNWRITTEN}|a race: thread .* writes what is read", "tile"),
    "no_second_barrier": ("a race: thread .* (writes|reads) what is (read|written)", "tile"),
    "unwritten": (UNWRITTEN, "tile"),
    "plain_sum": ("a race: another block writes what is read", r"\+="),
    "plain_beside_atomic": ("a race: .* writes what is written", "atomicAdd|out"),
    "read_by_blocks": ("a race: .* (writes|reads) what is (read|written)", r"out\[8\]"),
    "misaligned": ("a misaligned access", "reinterpret_cast"),
}
SOURCE = cuda_on_host.ROOT / "tests/cuda_on_host/misuse.cu"


def misuse(kernel: str, order: str) -> subprocess.CompletedProcess[str]:
    command = [cuda_on_host.BUILT / "misuse", kernel, str(cuda_on_host.ORDERS.index(order))]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("kernel", MISUSE)
def test_misuse_is_found(order: str, kernel: str) -> None:
    message, words = MISUSE[kernel]
    done = misuse(kernel, order)
    assert done.returncode == 1, done
    what, name, where = done.stdout.strip().split("\n")
    assert re.match(f"CUDA on the host: {message}", what)
    assert f"::{kernel}(" in name
    found = re.match(r"  block [0-2], thread \d+, at .*misuse\.cu:(\d+)", where)
    assert found, where
    line = SOURCE.read_text().split("\n")[int(found[1]) - 1]
    assert re.search(words, line), line


@pytest.mark.parametrize("kernel", ["sum", "halves"])
def test_correct_use_is_let_be(order: str, kernel: str) -> None:
    done = misuse(kernel, order)
    assert done.returncode == 0, done


def test_mutations_are_of_the_kernels_as_they_are() -> None:
    """Each breaks a line that is there once: `mutations.py` is run on demand, and would rot."""
    script = Path(__file__).with_name("cuda_on_host") / "mutations.py"
    known = runpy.run_path(str(script))
    assert len(known["MUTATIONS"]) >= 70
    for mutation in known["MUTATIONS"]:
        content = (known["ROOT"] / "csrc" / mutation.file).read_text()
        assert content.count(mutation.line) == 1, mutation.name
        assert (mutation.mutant == mutation.line) == (mutation.name == "nothing")
