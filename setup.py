"""Builds dagcore's native module. Every decision is printed; the environment switches:

DAGCORE_NATIVE=0         no native code: everything runs in PyTorch, more slowly
DAGCORE_CUDA=1 | 0       CUDA kernels or an error | none; unset: where nvcc and a CUDA torch are
DAGCORE_SANITIZE=1       CPU kernels with address and undefined-behaviour checks: `make sanitize`
DAGCORE_PTXAS_VERBOSE=1  print registers and spills of each CUDA kernel: see benchmarks/resources.py
TORCH_CUDA_ARCH_LIST     GPU architectures, as for any torch extension. Unset: those of the GPUs in
                         this machine; without one, every generation from 8.0 (A100) on that both
                         nvcc and torch know, and PTX for those that are still to come
CUDA_HOME or CUDA_PATH   the CUDA toolkit; unset: nvcc on PATH, then /usr/local/cuda
CC, CXX                  the host compilers
MAX_JOBS                 parallel compilations; unset: one a core
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import setuptools
from setuptools import setup

ROOT = Path(__file__).parent
STABLE_ABI = "0x020b000000000000"  # kernels need torch 2.11 or any later one
OLDEST = (8, 0)  # architecture that the kernels run on
PTX = (9, 0)  # every later GPU without code of its own compiles this, at its first launch
SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]


def log(message: str) -> None:
    print(f"dagcore: {message}", file=sys.stderr, flush=True)


def switch(name: str) -> bool | None:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"dagcore: {name} must be 0, 1 or unset, got {value!r}")
    return None if value == "" else value == "1"


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, candidates)), None)


def cuda_home(nvcc: str) -> Path:
    """The toolkit's folder, as nvcc itself knows it (nvcc on PATH may be a wrapper)."""
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    plan = subprocess.run(command, capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    return Path(top.group(1)).resolve() if top else Path(nvcc).resolve().parent.parent


def gpu_architectures(torch: ModuleType, nvcc: str) -> str:
    """What to compile for where TORCH_CUDA_ARCH_LIST is unset, as it would spell it.

    Code for the first architecture of a generation runs on the whole of it.
    """
    count = torch.cuda.device_count()
    seen = {torch.cuda.get_device_capability(i) for i in range(count)}
    if seen:
        return ";".join(f"{major}.{minor}" for major, minor in sorted(seen))
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    both = {*known.split()} & {*torch._C._cuda_getArchFlags().split()}
    every = sorted((int(sm[3:-1]), int(sm[-1])) for sm in both if re.fullmatch(r"sm_\d+", sm))
    first = {major: (major, minor) for major, minor in reversed(every) if (major, minor) >= OLDEST}
    return ";".join(
        f"{major}.{minor}" + "+PTX" * ((major, minor) == PTX)
        for major, minor in sorted({*first.values(), PTX})
    )


def choose_cuda(torch_cuda: str | None) -> str | None:
    """The nvcc to build CUDA kernels with, or None; fails where CUDA was asked for in vain."""
    wanted, nvcc = switch("DAGCORE_CUDA"), find_nvcc()
    missing = (
        "nvcc is not found (set CUDA_HOME or PATH)"
        if nvcc is None
        else "the installed torch is a CPU build"
        if torch_cuda is None
        else None
    )
    if wanted and missing:
        raise SystemExit(f"dagcore: DAGCORE_CUDA=1, but {missing}")
    if wanted is False:
        missing = "DAGCORE_CUDA=0"
    log(f"CUDA kernels: {f'no, {missing}' if missing else f'yes, with {nvcc}'}")
    return None if missing else nvcc


def native_extension() -> dict[str, object]:
    try:
        import pybind11
        import torch
    except ImportError as error:
        raise SystemExit(
            f"dagcore: building needs torch and pybind11 ({error}). Install them first and use "
            "'pip install --no-build-isolation .', or drop --no-build-isolation."
        ) from error
    sanitize = switch("DAGCORE_SANITIZE")
    if sanitize:
        if switch("DAGCORE_CUDA"):
            raise SystemExit("dagcore: DAGCORE_CUDA=1 contradicts DAGCORE_SANITIZE=1")
        os.environ["DAGCORE_CUDA"] = "0"
        log(f"sanitizers: {' '.join(SANITIZERS)}")
    nvcc = choose_cuda(torch.version.cuda)
    if nvcc:
        os.environ["CUDA_HOME"] = str(cuda_home(nvcc))
    from torch.utils import cpp_extension

    sources = ["csrc/module.cpp", *sorted(p.as_posix() for p in Path("csrc/cpu").glob("*.cpp"))]
    flags = [
        # At -O2 GCC uses fewer vectors: kernels take 2.6 times as long in the mean, some 30 times.
        "-O1" if sanitize else "-O3",
        "-ffp-contract=off",
        "-fno-trapping-math",
        "-fno-math-errno",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-unknown-pragmas",
        "-g1" if sanitize else "-g0",  # Python's own flags ask for -g: half the module's size
    ]
    macros: list[tuple[str, str | None]] = [("TORCH_TARGET_VERSION", STABLE_ABI)]
    include = [pybind11.get_include()]
    compile_args: dict[str, list[str]] = {"cxx": flags}
    link_args: list[str] = []
    if sanitize:
        flags += [*SANITIZERS, "-fno-omit-frame-pointer"]
        link_args += SANITIZERS
    kind = cpp_extension.CppExtension
    if nvcc:
        kind = cpp_extension.CUDAExtension
        sources += sorted(p.as_posix() for p in Path("csrc/cuda").glob("*.cu"))
        cuda_flags = ["-O3", "-Xcompiler=-fvisibility=hidden"]
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or gpu_architectures(torch, nvcc)
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
        log(f"CUDA architectures: {architectures}")
        if switch("DAGCORE_PTXAS_VERBOSE"):
            cuda_flags.append("-Xptxas=-v")
            log("registers and spills of each CUDA kernel: printed")
        macros += [("USE_CUDA", None), ("DAGCORE_CUDA_ARCHS", f'"{architectures}"')]
        compile_args["nvcc"] = cuda_flags
        home = Path(os.environ["CUDA_HOME"])
        if not (home / "include/cuda_runtime.h").exists():
            include += [str(p.parent) for p in pip_cuda("include/cuda_runtime.h")]
        libraries = [*home.glob("lib*/libcudart.so"), *home.glob("targets/*/lib/libcudart.so")]
        if not libraries:
            link_args += [str(p) for p in pip_cuda("lib/libcudart.so.*")]

    class Build(cpp_extension.BuildExtension):
        def run(self) -> None:
            super().run()
            package = Path(self.get_ext_fullpath("dagcore._native")).parent
            package.mkdir(parents=True, exist_ok=True)
            built = {"torch": torch.__version__, "cuda": torch.version.cuda if nvcc else None}
            (package / "_build.json").write_text(json.dumps(built) + "\n")

    extension = kind(
        "dagcore._native",
        sources,
        include_dirs=include,
        define_macros=macros,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
        # Before torch's libraries, which hand out symbols of C++'s own library without a version.
        libraries=["stdc++"] if sys.platform == "linux" else [],
        depends=["setup.py", *sorted(p.as_posix() for p in Path("csrc").rglob("*.[ch]*"))],
    )
    log(f"building for torch {torch.__version__} and later")
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


def pip_cuda(file: str) -> list[Path]:
    """A file in the pip packages that a CUDA build of torch depends on: the first, if any."""
    folders = [Path(entry or ".") for entry in sys.path]
    return [p for folder in folders for p in sorted(folder.glob(f"nvidia/*/{file}"))][:1]


os.chdir(ROOT)
if int(setuptools.__version__.partition(".")[0]) < 77:  # older ones cannot read pyproject.toml
    raise SystemExit(
        f"dagcore: building needs setuptools 77 or later, got {setuptools.__version__}: "
        "pip install 'setuptools>=77'"
    )
if switch("DAGCORE_NATIVE") is False:
    if switch("DAGCORE_CUDA"):
        raise SystemExit("dagcore: DAGCORE_CUDA=1 contradicts DAGCORE_NATIVE=0")
    log("native code: no, DAGCORE_NATIVE=0")
    setup()
else:
    setup(**native_extension())
