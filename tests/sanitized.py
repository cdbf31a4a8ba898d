"""The tests of the ops against the modules that `make sanitize` built: `python tests/sanitized.py`.

Run with the sanitizers' libraries preloaded and build/sanitize first on the path.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys
from pathlib import Path

import cuda_on_host
import numpy as np
import pytest
import torch

from dagcore import ops
from dagcore.ops import native

READ_TOO_FAR = "read too far"
BUILT = Path(__file__).parents[1] / "build" / "sanitize"
TESTS = (
    "test_seed_ops.py",
    "test_dag_seed.py",
    "test_dag_seed_bilinear.py",
    "test_argmax_bilinear.py",
    "test_linf_prox.py",
    "test_linf_step.py",
    "test_loss_seed.py",
    "test_loss_seed_bilinear.py",
    "test_pgd_step.py",
    "test_settle.py",
    "test_cuda_on_host.py",
    "test_registration.py",
    "test_fuzz.py",
)
# What torch.compile builds itself is not the module's; others limit the process's memory, which
# the sanitizer needs; misuse of CUDA is found by a check that the sanitizers displace.
LEFT_OUT = "not inductor and not nothing_of_the_enlarged_size and not memory_enough and not misuse"


def check_modules() -> None:
    """Exit unless the modules in use are the ones that were built here, instrumented."""
    if native.module is None or cuda_on_host.why_not():
        sys.exit("dagcore's native modules are not built: run `make sanitize`")
    for module in (Path(str(native.module.__file__)), cuda_on_host.BUILT / "kernels.so"):
        path = module.resolve()
        if BUILT not in path.parents:
            sys.exit(f"the module in use must be below {BUILT}, it is {path}: run `make sanitize`")
        content = path.read_bytes()
        missing = [n for n in ("__asan_init", "__ubsan_handle") if n.encode() not in content]
        if missing:
            sys.exit(f"{path} must be instrumented, it does not call {' or '.join(missing)}")


def read_too_far() -> None:
    """Hand an op scores whose memory ends before they do; does not come back."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.POINTER(ctypes.c_float)
    beyond = np.ctypeslib.as_array(libc.malloc(64 * 4), (1, 2, 64))
    ops.dag_seed(torch.from_numpy(beyond), torch.zeros(1, 64, dtype=torch.int64), "runner-up")


def check_that_faults_are_found(kernels: str, source: str) -> None:
    """Exit unless reading beyond a tensor's memory is reported."""
    command = [sys.executable, __file__, READ_TOO_FAR, kernels]
    done = subprocess.run(command, capture_output=True, text=True)
    wanted = ("AddressSanitizer: heap-buffer-overflow", source)
    if done.returncode == 0 or not all(words in done.stderr for words in wanted):
        sys.exit(f"reading beyond a tensor must be reported, got {done.stderr or 'nothing'}")


if __name__ == "__main__":
    check_modules()
    if sys.argv[1:2] == [READ_TOO_FAR]:
        on_host = sys.argv[2] == "cuda-on-host"
        with cuda_on_host.running("forward") if on_host else contextlib.nullcontext():
            read_too_far()
        sys.exit(0)
    check_that_faults_are_found("cpu", "dag_seed.cpp")
    check_that_faults_are_found("cuda-on-host", "dag_seed.cu")
    folder = Path(__file__).parent
    sys.exit(
        pytest.main(
            ["-q", "-p", "no:cacheprovider", "-k", LEFT_OUT, *sys.argv[1:]]
            + [str(folder / name) for name in TESTS]
        )
    )
