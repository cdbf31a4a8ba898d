"""What the tests of the commands share: a command line in this process or another, its files."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import dagcore
from dagcore.__main__ import main

ENDINGS = {".png", ".perturbation.safetensors", ".json", ".figure.png"}


def command(*arguments, cwd=None, **environment):
    """Run `dagcore` in a process of its own, where warnings are errors."""
    root = os.path.dirname(os.path.dirname(dagcore.__file__))
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "dagcore", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )


def attack(*arguments, model, image="cat.png", out="out"):
    """Run `dagcore attack` on one image or several."""
    images = [image] if isinstance(image, str) else image
    return main(["attack", *images, "--model", model, "--out", out, *map(str, arguments)])


def refused(capsys, *arguments, **options):
    """The one line in which bad input ends."""
    assert attack(*arguments, **options) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("dagcore attack: error: ")
    assert output.err.count("\n") == 1
    return output.err


def record(name="cat", out="out"):
    """What is written of an attacked image."""
    with open(os.path.join(out, f"{name}.json")) as file:
        return json.load(file)


def pixels(path):
    """The pixels of a file: (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 255


def check_outputs(out, name, clean):
    """Check that the files of an attacked image agree; return the record."""
    assert {p.name for p in out.iterdir()} == {name + ending for ending in ENDINGS}
    perturbation = load_file(out / f"{name}.perturbation.safetensors")["perturbation"]
    written = pixels(out / f"{name}.png")
    torch.testing.assert_close(
        written, dagcore.perturbation.round_to_8_bits(clean + perturbation), rtol=0, atol=0
    )
    numbers = record(name, out)
    assert numbers["perceptibility"] == pytest.approx(
        float(dagcore.perturbation.perceptibility(perturbation[None]))
    )
    assert len(numbers["active"]) == numbers["iterations"] + 1
    with Image.open(out / f"{name}.figure.png") as figure:
        assert figure.format == "PNG"
    return numbers
