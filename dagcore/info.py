"""What was built, what is running and what it runs on: `python -m dagcore.info`."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence

import numpy
import torch

from . import ops
from .ops import native
from .version import __version__

BACKENDS = ("CPU", "CUDA")


def versions() -> dict[str, str | None]:
    """Return the versions that a result depends on."""
    built = native.built_for()
    return {
        "dagcore": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torch built for": built.get("torch"),
        "cuda of torch": torch.version.cuda,
        "cuda built for": built.get("cuda"),
        "numpy": numpy.__version__,
    }


def registered(op: str, backend: str) -> bool:
    """Return whether an op has a native kernel on a backend ("CPU" or "CUDA")."""
    found: bool = torch._C._dispatch_has_kernel_for_dispatch_key(f"dagcore::{op}", backend)
    return found


def facts() -> dict[str, str]:
    """Return everything that `dagcore info` prints, by name."""
    found = {name: version or "none" for name, version in versions().items()}
    for backend in BACKENDS:
        native_ops = [op for op in ops.OPS if registered(op, backend)]
        others = [op for op in ops.OPS if op not in native_ops]
        rest = f"; in PyTorch: {', '.join(others)}" if others else ""
        found[f"native ops on {backend}"] = (", ".join(native_ops) or "none") + rest
    module = native.module
    if module is None:
        found["native module"] = "not built: everything runs in PyTorch, more slowly"
    else:
        found["native module"] = "loaded"
        found["SIMD in use"] = f"{module.simd_in_use()} (supported: {module.simd_supported()})"
        found["CUDA architectures"] = module.cuda_architectures or "none"
    found["threads"] = str(torch.get_num_threads())
    found["GPU"] = gpus()
    return found


def gpus() -> str:
    """Describe the GPUs that torch sees."""
    if not torch.cuda.is_available():
        return "none"
    built = None if native.module is None else native.module.cuda_architectures
    names = []
    for k in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(k)
        of = "" if not built else f", {coverage(built, capability)}"
        names.append(f"{torch.cuda.get_device_name(k)} ({capability[0]}.{capability[1]}{of})")
    return ", ".join(names)


def coverage(architectures: str, capability: tuple[int, int]) -> str:
    """Describe how kernels built for `architectures`, such as "8.0;9.0+PTX", run on a GPU.

    Code runs on every later GPU of its generation (the number before the point); PTX is compiled
    for any later GPU when a kernel is first launched.
    """
    entries = architectures.replace(" ", ";").split(";")
    built = {tuple(map(int, one.removesuffix("+PTX").split("."))): one for one in entries}
    if any(one[0] == capability[0] and one <= capability for one in built):
        return "covered by the kernels"
    if any(name.endswith("+PTX") and one <= capability for one, name in built.items()):
        return "covered: the kernels are compiled for it at their first launch"
    return f"NOT covered by the kernels, which are for {architectures}"


def show(require_cuda_kernels: bool = False) -> int:
    """Print the facts; return 1 if CUDA kernels are required but missing, else 0."""
    found = facts()
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")
    missing = [op for op in ops.OPS if not registered(op, "CUDA")]
    if require_cuda_kernels and missing:
        print(f"dagcore info: no CUDA kernel for {', '.join(missing)}", file=sys.stderr)
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m dagcore.info`."""
    parser = argparse.ArgumentParser(prog="python -m dagcore.info", description=__doc__)
    parser.add_argument(
        "--require-cuda-kernels",
        action="store_true",
        help="exit with status 1 unless every op has its CUDA kernel",
    )
    return show(parser.parse_args(argv).require_cuda_kernels)


if __name__ == "__main__":
    sys.exit(main())
