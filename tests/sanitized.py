"""The tests of the ops against the module that `make sanitize` built: `python tests/sanitized.py`.

Run with the sanitizers' libraries preloaded and build/sanitize first on the path.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dagcore import ops
from dagcore.ops import native

BUILT = Path(__file__).parents[1] / "build" / "sanitize"
TESTS = (
    "test_seed_ops.py",
    "test_dag_seed.py",
    "test_dag_seed_bilinear.py",
    "test_argmax_bilinear.py",
    "test_linf_step.py",
    "test_registration.py",
    "test_fuzz.py",
)
# What torch.compile builds itself is not the module's; the other limits the process's memory, which
# the sanitizer needs.
LEFT_OUT = "not inductor and not nothing_of_the_enlarged_size"


def check_module() -> None:
    """Exit unless the loaded module is the one that was built here, instrumented."""
    if native.module is None:
        sys.exit("dagcore's native module is not built: run `make sanitize`")
    path = Path(str(native.module.__file__)).resolve()
    if BUILT not in path.parents:
        sys.exit(f"the module in use must be below {BUILT}, it is {path}: run `make sanitize`")
    content = path.read_bytes()
    missing = [name for name in ("__asan_init", "__ubsan_handle") if name.encode() not in content]
    if missing:
        sys.exit(f"{path} must be instrumented, it does not call {' or '.join(missing)}")


def read_too_far() -> None:
    """Hand an op scores whose memory ends before they do; does not come back."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.POINTER(ctypes.c_float)
    beyond = np.ctypeslib.as_array(libc.malloc(64 * 4), (1, 2, 64))
    ops.dag_seed(torch.from_numpy(beyond), torch.zeros(1, 64, dtype=torch.int64), "runner-up")


def check_that_faults_are_found() -> None:
    """Exit unless reading beyond a tensor's memory is reported."""
    command = [sys.executable, __file__, "read too far"]
    done = subprocess.run(command, capture_output=True, text=True)
    wanted = ("AddressSanitizer: heap-buffer-overflow", "dag_seed.cpp")
    if done.returncode == 0 or not all(words in done.stderr for words in wanted):
        sys.exit(f"reading beyond a tensor must be reported, got {done.stderr or 'nothing'}")


if __name__ == "__main__":
    check_module()
    if sys.argv[1:] == ["read too far"]:
        read_too_far()
        sys.exit(0)
    check_that_faults_are_found()
    folder = Path(__file__).parent
    sys.exit(
        pytest.main(
            ["-q", "-p", "no:cacheprovider", "-k", LEFT_OUT, *sys.argv[1:]]
            + [str(folder / name) for name in TESTS]
        )
    )
