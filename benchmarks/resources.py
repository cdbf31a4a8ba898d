"""Registers, stack and spills of every CUDA kernel, from the compiler's report of a build.

    DAGCORE_PTXAS_VERBOSE=1 python setup.py build_ext --inplace --force 2>&1 |
        python benchmarks/resources.py

Exits 1 if a kernel spills or keeps a stack frame (local memory), 2 if there is no report.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\S+)' for '(?P<architecture>\w+)'\n(?:.*\n)*?"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n.*?Used (?P<registers>\d+) registers"
)


def readable(kernels: list[str]) -> list[str]:
    """Demangled names, without the argument list."""
    if shutil.which("c++filt") is None:
        return kernels
    out = subprocess.run(
        ["c++filt"], input="\n".join(kernels), capture_output=True, text=True, check=True
    )
    noise = re.compile(r"dagcore::|\(anonymous namespace\)::|^void |\([\w:]+\)(?=\d)")  # casts too
    return [re.sub(r"\(.*", "", noise.sub("", line)) for line in out.stdout.splitlines()]


def main() -> int:
    entries = [match.groupdict() for match in ENTRY.finditer(sys.stdin.read())]
    if not entries:
        print(
            "no kernels in the report: was the build for CUDA, with DAGCORE_PTXAS_VERBOSE=1?",
            file=sys.stderr,
        )
        return 2
    names = readable([entry["kernel"] for entry in entries])
    columns = ("architecture", "registers", "stack", "stores", "loads")
    rows = sorted(
        {(name, *(e[c] for c in columns)) for name, e in zip(names, entries, strict=True)}
    )
    print("| kernel | architecture | registers | stack bytes | spill stores | spill loads |")
    print("|---|---|---:|---:|---:|---:|")
    for name, *figures in rows:
        print(f"| `{name}` | {' | '.join(figures)} |")
    spilling = [row for row in rows if row[3:] != ("0", "0", "0")]
    print(f"\n{len(rows)} kernels, {len(spilling)} with spills or a stack frame")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
