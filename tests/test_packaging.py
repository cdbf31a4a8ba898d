"""What a source distribution holds, and what a native module may import: see wheels.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
import wheels

from dagcore.ops import native

ROOT = Path(__file__).parents[1]
NOT_SHIPPED = (".github/*", ".gitignore")
BUILT = ("dagcore/_build.json", "dagcore/_native.so", "tests/__pycache__/conftest.pyc")
# C++'s own library, which a build outside of a manylinux image may find in torch's: `make wheel`
# is stricter.
STANDARD = ("_ZNKRSt", "_ZNOSt", "_ZNSt", "_ZSt")
BUILD = """
import sys
from setuptools import build_meta
print(build_meta.build_sdist(sys.argv[1]))
"""


def tracked_files() -> list[str]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0 or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files are tracked is not known")
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_source_distribution_holds_every_tracked_file_and_nothing_built(tmp_path: Path) -> None:
    tracked = tracked_files()
    source = tmp_path / "source"
    for name in (*tracked, *BUILT):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if name in tracked:
            shutil.copy(ROOT / name, source / name)
        else:
            (source / name).touch()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(tmp_path)],
        cwd=source,
        env=os.environ | {"DAGCORE_NATIVE": "0", "DAGCORE_CUDA": ""},  # not of what is packed
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    archive = tmp_path / done.stdout.splitlines()[-1]
    with tarfile.open(archive) as packed:
        inside = {name.partition("/")[2] for name in packed.getnames()}
    wanted = {n for n in tracked if not any(fnmatch(n, pattern) for pattern in NOT_SHIPPED)}
    assert {"csrc/module.cpp", "tests/conftest.py", "docs/conf.py", "LICENSE"} <= wanted
    assert sorted(wanted - inside) == []
    assert sorted(inside & {*BUILT}) == []
    wheels.check_sdist(archive)


def test_symbols_that_are_neither_stable_nor_versioned_are_found() -> None:
    stable = (
        "aoti_torch_get_sizes",
        "torch_parallel_for",
        "PyErr_Format",
        "_Py_Dealloc",
        "memcpy@GLIBC_2.14",
        "_ZSt20__throw_length_errorPKc@GLIBCXX_3.4",
        "__gxx_personality_v0@CXXABI_1.3",
        "_Unwind_Resume@GCC_3.0",
        "cudaLaunchKernelExC@libcudart.so.13",
        "__gmon_start__",
    )
    other = (
        "_ZN2at6detail10getCUDAHooksEv",
        "_ZN3c105ErrorC1ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE",
        "_ZSt28__throw_bad_array_new_lengthv",  # of libstdc++, but as libc10 has it
        "THPVariable_Wrap",
        "omp_get_num_threads",
    )
    assert wheels.unstable([*stable, *other]) == [*other]


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not there")
def test_native_module_needs_of_torch_what_is_stable() -> None:
    symbols = wheels.undefined_symbols(Path(str(native.module.__file__)))
    assert "aoti_torch_get_sizes" in symbols
    assert [name for name in wheels.unstable(symbols) if not name.startswith(STANDARD)] == []
