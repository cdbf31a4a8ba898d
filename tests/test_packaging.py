"""What a source distribution holds, and which packages a wheel would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = (
    "csrc/*",
    "tests/*",
    "benchmarks/*.py",
    "benchmarks/*.sh",
    "dagcore/*",
    ".ci/run",
    ".clang-format",
    "CHANGELOG.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "pyproject.toml",
    "setup.py",
)
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


def test_source_distribution_holds_every_tracked_source(tmp_path: Path) -> None:
    tracked = tracked_files()
    source = tmp_path / "source"
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
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
    wanted = {name for name in tracked if any(fnmatch(name, pattern) for pattern in SHIPPED)}
    assert {"csrc/module.cpp", "tests/conftest.py", "LICENSE"} <= wanted
    assert sorted(wanted - inside) == []
    assert [name for name in inside if name.endswith((".so", ".pyc"))] == []
