"""What all benchmarks share: sides timed in alternation, tables, the machine in words."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from dagcore.ops import native
from dagcore.timing import alternate, seconds, spread

__all__ = ["alternate", "seconds", "spread"]  # and what is defined here

RESULTS = Path(__file__).with_name("results")
NOTE = "Medians (quartiles); the sides of a row are timed in alternation, in one process."


def machine(device: str) -> dict[str, Any]:
    """The machine in words, and the versions."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((s.split(":")[1].strip() for s in lines if "model name" in s), processor)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=RESULTS.parent,
        capture_output=True,
        text=True,
    ).stdout.strip()
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": native.module.simd_in_use() if native.module else "none",
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows as a table, with a column for every name that any of them has."""
    head = list(dict.fromkeys(name for row in rows for name in row))
    lines = [head, ["---"] * len(head), *([str(row.get(h, "")) for h in head] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def save(
    name: str | None,
    device: str,
    rows: list[dict[str, Any]],
    record: Any,
    command: str,
    note: str = NOTE,
) -> None:
    """Print a table; with a name, keep it and its numbers in benchmarks/results."""
    text = markdown(rows)
    print(f"\n{text}")
    if not name:
        return
    about = machine(device)
    words = ", ".join(f"{key} {value}" for key, value in about.items())
    RESULTS.mkdir(exist_ok=True)
    page = f"`{command}`\n\n{note}\n\nMachine: {words}.\n\n{text}\n"
    (RESULTS / f"{name}.md").write_text(page)
    kept = {"command": command, "machine": about, "rows": record}
    (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")


def photographs(count: int, height: int, width: int) -> torch.Tensor:
    """Crops of scikit-image's photographs, (count, 3, height, width) in [0, 1]."""
    import numpy as np
    import skimage.data
    from PIL import Image, ImageOps

    names = ("chelsea", "astronaut", "coffee", "rocket")
    generator = np.random.default_rng(0)
    crops = []
    for k in range(count):
        photo = Image.fromarray(getattr(skimage.data, names[k % len(names)])())
        zoom = 1.0 if k < len(names) else float(generator.uniform(0.5, 1.0))
        size = (round(photo.width * zoom), round(photo.height * zoom))
        left = int(generator.integers(0, photo.width - size[0] + 1))
        top = int(generator.integers(0, photo.height - size[1] + 1))
        part = photo.crop((left, top, left + size[0], top + size[1]))
        crops.append(np.array(ImageOps.fit(part, (width, height))))
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous().float() / 255


def calibrate(network: torch.nn.Module, images: torch.Tensor) -> torch.nn.Module:
    """Give a randomly initialised network the batch statistics of real images.

    With the default running statistics activations of an untrained network die out or blow up; its
    scores would then say the same class everywhere.
    """
    network.train()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.momentum = None  # cumulative average
                module.reset_running_stats()
        for _ in range(2):
            network(images)
    return network.eval()


def chosen(names: Iterable[str], wanted: list[str] | None) -> list[str]:
    """Those of `names` that were asked for, all of them if none was."""
    return [name for name in names if not wanted or name in wanted]
