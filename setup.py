"""Builds dagcore's native module. Every decision is printed; the environment switches:

DAGCORE_NATIVE=0         no native code: everything runs on the PyTorch reference
DAGCORE_CUDA=1 | 0       CUDA kernels or an error | none; unset: where nvcc and a CUDA torch are
DAGCORE_SANITIZE=1       CPU kernels with address and undefined-behaviour checks: `make sanitize`
DAGCORE_PTXAS_VERBOSE=1  print registers and spills of each CUDA kernel: see benchmarks/resources.py
TORCH_CUDA_ARCH_LIST     GPU architectures, as for any torch extension. Unset: those of the GPUs in
                         this machine; without one, the first of each generation from 8.0 on that
                         nvcc lists (8.0, 9.0, 10.0, ...), the last with PTX for GPUs to come
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

from setuptools import setup

ROOT = Path(__file__).parent
STABLE_ABI = "0x020b000000000000"  # kernels need torch 2.11 or any later one
OLDEST_GENERATION = 8  # of GPUs, where there is none to ask
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


def choose_architectures(nvcc: str, torch_cuda: ModuleType) -> list[str]:
    """What to compile for where TORCH_CUDA_ARCH_LIST is unset, as it would spell them."""
    if torch_cuda.is_available():
        seen = {torch_cuda.get_device_capability(i) for i in range(torch_cuda.device_count())}
        return [f"{major}.{minor}" for major, minor in sorted(seen)]
    codes = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    first: dict[int, int] = {}
    for major, minor in re.findall(r"\bsm_(\d+)(\d)\b", codes):
        first[int(major)] = min(int(minor), first.get(int(major), 9))
    chosen = [f"{n}.{first[n]}" for n in sorted(first) if n >= OLDEST_GENERATION]
    if not chosen:
        raise SystemExit(f"dagcore: {nvcc} --list-gpu-code lists no sm_80 or later: {codes!r}")
    return [*chosen[:-1], f"{chosen[-1]}+PTX"]


def architecture_flags(architectures: list[str]) -> list[str]:
    flags = []
    for architecture in architectures:
        number = architecture.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if architecture.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


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
        cuda_flags = ["-O3", "--fmad=false", "-Xcompiler=-fvisibility=hidden"]
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        if not architectures:
            chosen = choose_architectures(nvcc, torch.cuda)
            cuda_flags += architecture_flags(chosen)
            architectures = ";".join(chosen)
        log(f"CUDA architectures: {architectures}")
        if switch("DAGCORE_PTXAS_VERBOSE"):
            cuda_flags.append("-Xptxas=-v")
            log("registers and spills of each CUDA kernel: printed")
        macros += [("USE_CUDA", None), ("DAGCORE_CUDA_ARCHS", f'"{architectures}"')]
        compile_args["nvcc"] = cuda_flags
        include += pip_cuda_headers(Path(os.environ["CUDA_HOME"]))
        link_args += pip_cuda_runtime(Path(os.environ["CUDA_HOME"]))

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
        depends=["setup.py", *sorted(p.as_posix() for p in Path("csrc").rglob("*.[ch]*"))],
    )
    log(f"building for torch {torch.__version__} and later")
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


def pip_cuda(*parts: str) -> list[Path]:
    """Folders of the pip packages that a CUDA build of torch depends on."""
    return [
        p
        for entry in sys.path
        for p in sorted(Path(entry or ".").glob("/".join(("nvidia", *parts))))
    ]


def pip_cuda_headers(home: Path) -> list[str]:
    if (home / "include/cuda_runtime.h").exists():
        return []
    return [str(p.parent) for p in pip_cuda("*", "include", "cuda_runtime.h")][:1]


def pip_cuda_runtime(home: Path) -> list[str]:
    if any(
        (home / lib / "libcudart.so").exists()
        for lib in ("lib64", "lib", "targets/x86_64-linux/lib")
    ):
        return []
    return [str(p) for p in pip_cuda("*", "lib", "libcudart.so.*")][:1]


os.chdir(ROOT)
if switch("DAGCORE_NATIVE") is False:
    if switch("DAGCORE_CUDA"):
        raise SystemExit("dagcore: DAGCORE_CUDA=1 contradicts DAGCORE_NATIVE=0")
    log("native code: no, DAGCORE_NATIVE=0")
    setup()
else:
    setup(**native_extension())
