"""Compile the kernels of csrc/cuda for the host, as build/cuda-on-host/kernels.so: see README.md.

Beside them goes `misuse`, a program of small kernels that the scheduler's own tests run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FLAGS = [
    "-std=c++20",
    "-fPIC",
    "-g1",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",  # what such variables hold is a pattern here
    "-ftrivial-auto-var-init=pattern",
]
CHECKED = ["-fsanitize=thread,alignment", "-fno-sanitize-recover=alignment"]  # see accesses.cpp
SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
RULES = """\
builddir = .
cxx = {cxx}
flags = {flags}
links = {links}
rule compile
  command = $cxx $flags $more -MMD -MF $out.d -x c++ -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx $flags $in -o $out $more $links
"""


def rules(csrc: Path, sanitize: bool) -> str:
    """What ninja is to do; the kernels alone are compiled so that each access is checked."""
    (torch,) = find_spec("torch").submodule_search_locations
    include = f"-I{HERE}/include -I{torch}/include -I{torch}/include/torch/csrc/api/include"
    macros = "-DDAGCORE_LIBRARY=dagcore_on_host -DDAGCORE_CUDA_KEY=CPU"
    checked = "" if sanitize else " ".join(CHECKED)
    flags = [*FLAGS, *(["-O1", "-fno-omit-frame-pointer", *SANITIZERS] if sanitize else ["-O2"])]
    lines = [RULES.format(cxx=os.environ.get("CXX", "g++"), flags=" ".join(flags), links="-ldl")]

    def compile_one(source: Path, more: str) -> str:
        lines.append(f"build {source.stem}.o: compile {source}\n  more = {more}")
        return f"{source.stem}.o"

    scheduler = [
        compile_one(HERE / name, f"-I{HERE}/include") for name in ("scheduler.cpp", "accesses.cpp")
    ]
    kernels = [
        compile_one(source, f"{checked} {macros} {include}")
        for source in sorted(csrc.glob("cuda/*.cu"))
    ]
    misuse = compile_one(HERE / "misuse.cu", f"{checked} -I{HERE}/include")
    libraries = f"-L{torch}/lib -ltorch -ltorch_cpu -lc10"
    lines.append(f"build kernels.so: link {' '.join([*kernels, *scheduler])}")
    lines.append(f"  more = -shared {libraries}")
    lines.append(f"build misuse: link {' '.join([misuse, *scheduler])}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csrc", type=Path, default=ROOT / "csrc")
    parser.add_argument("--out", type=Path, default=ROOT / "build/cuda-on-host")
    parser.add_argument("--sanitize", action="store_true", help="with ASan and UBSan instead")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    content = rules(given.csrc.resolve(), given.sanitize)
    file = given.out / "build.ninja"
    if not file.exists() or file.read_text() != content:
        file.write_text(content)
    command = ["ninja", "--quiet", "-C", str(given.out)]
    sys.exit(subprocess.run(command).returncode)


if __name__ == "__main__":
    main()
