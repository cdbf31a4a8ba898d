"""Commands that work on a data set, in processes of their own that a signal hits where it hurts."""

import itertools
import multiprocessing
import os
import runpy
import subprocess
import sys

import numpy as np
from PIL import Image

import dagcore
from dagcore.__main__ import main

# The victim's module sends its process a signal right before one of the run's files is opened to be
# written, or is renamed. FATE says which signal, "open" or "os.rename", a part of the file's path,
# how many of these come first, and the rank.
VICTIM = """
import itertools, os, signal, sys
import torch
from torch import nn
from dagcore.victims import Victim

def make():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1))
    for k, layer in enumerate(net):
        rng = torch.Generator().manual_seed(k)
        layer.weight.data = torch.randn(layer.weight.shape, generator=rng) / 10
        layer.bias.data.zero_()
    return Victim(net)

def hook(event, arguments):
    if event == kind and (event == "os.rename" or (arguments[2] or 0) & os.O_ACCMODE):
        path = str(arguments[event == "os.rename"])
        if path.startswith(out) and place in path and next(passed) == int(first):
            os.kill(os.getpid(), getattr(signal, name))

if os.environ.get("FATE"):
    name, kind, place, first, rank, out = os.environ["FATE"].split()
    passed = itertools.count()
    if os.environ.get("RANK", "0") == rank:
        sys.addaudithook(hook)
"""
NUMBERS = itertools.count()
CHANGING = ("speed.json", ".lock")  # these tell of the processes


def prepare(here, count):
    """Put a data set into a folder, one of whose images is broken, and a victim."""
    (here / "killed_victim.py").write_text(VICTIM)
    (here / "photos").mkdir()
    rng = np.random.default_rng(0)
    for k in range(count):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(
            here / "photos" / f"{k:03d}.png"
        )
    (here / "photos" / "007.png").write_text("broken")


def launch(command, here, out, *arguments, ranks=0, fate=None, fork=False, **options):
    """Start a command on the data set; or fork it, which spares it the import of torch."""
    given = ["--data", "photos", "--model", "killed_victim:make", "--device", "cpu", *arguments]
    given = [command, *given, "--out", out]
    fate = f"{fate} {out}" if fate else ""
    if fork:
        return Forked(here, "dagcore", given, fate)
    program = ["-m"]
    if ranks:
        program += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        program += ["-m"]
    return start(here, [*program, "dagcore", *given], fate, **options)


def environment(here, fate):
    root = os.path.dirname(os.path.dirname(dagcore.__file__))
    path = os.pathsep.join([root, str(here)])
    return {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "FATE": fate}


def start(here, arguments, fate="", **options):
    """Start Python in a folder."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=here,
        env=os.environ | environment(here, fate),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


FORKS = multiprocessing.get_context("forkserver")
COMMANDS = ["dagcore.cli.run", "dagcore.cli.evaluate", "dagcore.paper"]
THEIRS = ["torch.fx.experimental.symbolic_shapes", "torchvision.models.detection"]
FORKS.set_forkserver_preload(COMMANDS + THEIRS)


class Forked:
    """A program, "dagcore" or the path of a script, in a process that is forked from one that has
    imported it all; otherwise like `start`."""

    def __init__(self, here, program, arguments, fate=""):
        said = here / f"said-{next(NUMBERS)}"
        self.said = [said.with_suffix(ending) for ending in (".out", ".err")]
        given = (here, program, arguments, fate, self.said)
        self.process = FORKS.Process(target=run_forked, args=given)
        self.process.start()

    def poll(self):
        return self.process.exitcode

    def kill(self):
        self.process.kill()

    def communicate(self, timeout):
        self.process.join(timeout)
        assert not self.process.is_alive(), f"still running after {timeout} s"
        self.returncode = self.process.exitcode
        return [path.read_text() for path in self.said]


def run_forked(here, program, arguments, fate, said):
    """What a forked process does."""
    os.chdir(here)
    os.environ.update(environment(here, fate))
    sys.path.insert(0, str(here))
    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), number)
    sys.argv = [program, *map(str, arguments)]
    if program == "dagcore":
        sys.exit(main(sys.argv[1:]))
    runpy.run_path(program, run_name="__main__")


def wait(process):
    """The process when it has ended, with what it said."""
    try:
        process.stdout_text, process.stderr_text = process.communicate(timeout=240)
    finally:
        process.kill()
    process.stderr = process.stderr_text
    return process


def results(out):
    """The bytes of every file that is not on its way."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and not path.name.startswith(".") and path.name not in CHANGING
    }
