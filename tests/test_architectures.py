"""The GPUs that the built kernels run on."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from dagcore.info import coverage
from dagcore.ops import native

CONTAINER, ENTRY_ARCHITECTURE = 0xBA55ED50, 28  # of CUDA's "fat binaries": magic, offset
KINDS = {1: "+PTX", 2: ""}


def fat_binary_entries(data: bytes) -> set[str]:
    """The architectures that a module has code for, "9.0", or PTX, "9.0+PTX"."""
    found, at = set(), -1
    while (at := data.find(struct.pack("<I", CONTAINER), at + 1)) >= 0:
        header, size = struct.unpack_from("<HQ", data, at + 6)
        entry, end = at + header, at + header + size
        while entry < end:
            kind, header, size = struct.unpack_from("<HxxIQ", data, entry)
            (number,) = struct.unpack_from("<I", data, entry + ENTRY_ARCHITECTURE)
            found.add(f"{number // 10}.{number % 10}{KINDS[kind]}")
            entry += header + size
    return found


def test_the_module_holds_what_it_says() -> None:
    assert native.module is not None
    said = native.module.cuda_architectures
    if not said:
        pytest.skip("dagcore's native module was built without CUDA")
    expected = set()
    for one in said.replace(" ", ";").split(";"):
        expected |= {one, one.removesuffix("+PTX")}
    assert fat_binary_entries(Path(str(native.module.__file__)).read_bytes()) == expected


EVERY = "8.0;9.0+PTX;10.0;12.0"


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        *[(EVERY, gpu, "covered by") for gpu in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3))],
        *[(EVERY, gpu, "covered by") for gpu in ((12, 0), (12, 1))],
        *[(EVERY, gpu, "covered: the kernels are compiled") for gpu in ((11, 0), (13, 0))],
        (EVERY, (7, 5), "NOT covered"),
        ("9.0", (8, 9), "NOT covered"),
        ("9.0", (10, 0), "NOT covered"),
        ("8.6", (8, 0), "NOT covered"),
        ("8.0 9.0+PTX", (12, 0), "covered: the kernels are compiled"),
        ("12.1+PTX", (10, 0), "NOT covered"),
    ],
)
def test_coverage(architectures: str, capability: tuple[int, int], expected: str) -> None:
    assert coverage(architectures, capability).startswith(expected)
