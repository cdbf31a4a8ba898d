"""`dagcore run` that is killed, interrupted, run twice, out of space, or spread over processes."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import dagcore

COUNT = 60
# Slow enough to be killed between an image and its record.
VICTIM = """
import torch
from torch import nn
from dagcore.victims import Victim

def make():
    net = nn.Sequential(nn.Conv2d(3, 96, 3, padding=1), nn.Conv2d(96, 6, 3, padding=1))
    for k, layer in enumerate(net):
        rng = torch.Generator().manual_seed(k)
        layer.weight.data = torch.randn(layer.weight.shape, generator=rng) / 10
        layer.bias.data.zero_()
    return Victim(net)
"""
CHANGING = ("speed.json", ".lock")  # these tell of the processes


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a data set, one of whose images is broken, and what a run makes of it."""
    here = tmp_path_factory.mktemp("run")
    (here / "killed_victim.py").write_text(VICTIM)
    (here / "photos").mkdir()
    rng = np.random.default_rng(0)
    for k in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(
            here / "photos" / f"{k:03d}.png"
        )
    (here / "photos" / "007.png").write_text("broken")
    done = wait(launch(here, "whole"))
    assert done.returncode == 0, done.stderr
    assert len(results(here / "whole")) == COUNT - 1 + COUNT - 1 + 4 + 3  # images, r, figures, rest
    return here


ARGUMENTS = ("--data", "photos", "--model", "killed_victim:make", "--max-iter", "12")
ARGUMENTS += ("--device", "cpu")


def launch(here, out, *arguments, ranks=0, **options):
    root = os.path.dirname(os.path.dirname(dagcore.__file__))
    program = [sys.executable, "-m"]
    if ranks:
        program += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        program += ["-m"]
    command = [*program, "dagcore", "run", *ARGUMENTS, "--perturbations", *arguments]
    return subprocess.Popen(
        [*command, "--out", out],
        cwd=here,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([root, str(here)]),
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


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


def records(out):
    """When the record of each image was written, and its image."""
    return {
        path.name: path.stat().st_mtime_ns
        for kind in ("records", "images")
        for path in (out / kind).glob("[0-9]*")
    }


def killed_after(process, out, files):
    """Kill a run once there are so many files."""
    while process.poll() is None and len(list(out.rglob("[0-9]*"))) < files:
        time.sleep(0.001)
    process.kill()
    process.communicate(timeout=240)


def test_killed_at_twenty_random_moments(here):
    expected, out = results(here / "whole"), here / "killed"
    rng = random.Random(0)
    moments = 0
    for _ in range(20):
        before = records(out)
        files = len(list(out.rglob("[0-9]*")))
        killed_after(launch(here, "killed"), out, files + rng.randint(1, 8))
        if (out / "images.jsonl").exists():
            break
        moments += 1
        partial = results(out)
        kept = {name: data for name, data in partial.items() if not name.startswith("records/")}
        assert kept.items() <= expected.items()  # whole files only, and the right ones
        done = {int(name.removesuffix(".json")) for name in before if name.endswith(".json")} - {7}
        after = records(out)
        for number in done:  # nothing is done again
            for name in (f"{number:08d}.json", f"{number:03d}.png"):
                assert before.get(name) == after.get(name)
    assert moments >= 10
    assert wait(launch(here, "killed")).returncode == 0
    assert results(out) == expected
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_cleanly_and_says_how_to_go_on(here, number):
    out = here / number.name
    process = launch(here, number.name)
    while len(list(out.glob("records/*.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(number)
    done = wait(process)
    assert done.returncode == 128 + number
    last = done.stderr.splitlines()[-1]
    have = len(list(out.glob("records/*.json")))
    assert last == (
        f"dagcore run: {number.name} after {have} of {COUNT} images: the same command goes on "
        "from there"
    )
    assert "Traceback" not in done.stderr
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]
    assert wait(launch(here, number.name)).returncode == 0
    assert results(out) == results(here / "whole")


def test_a_second_run_on_the_same_folder_is_refused(here):
    out = here / "twice"
    first = launch(here, "twice")
    while not list(out.glob("records/*.json")):
        assert first.poll() is None
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)  # it stays at work while the second looks
    try:
        second = wait(launch(here, "twice"))
    finally:
        first.send_signal(signal.SIGCONT)
    assert second.returncode == 2
    assert "another run is at work there (process " in second.stderr
    assert f"process {first.pid} on " in second.stderr
    assert wait(first).returncode == 0
    assert results(out) == results(here / "whole")


def test_a_full_disk_loses_nothing(here):
    """No file may grow beyond some bytes: writing fails as on a full disk."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    out = here / "full"
    done = wait(launch(here, "full", preexec_fn=limit))
    assert done.returncode == 2
    assert "File too large" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list(out.glob("images/*"))
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]
    assert wait(launch(here, "full")).returncode == 0
    assert results(out) == results(here / "whole")


def test_two_ranks_give_the_same_bytes(here):
    done = wait(launch(here, "ranks", ranks=2))
    assert done.returncode == 0, done.stderr
    assert results(here / "ranks") == results(here / "whole")
    (speed,) = json.loads((here / "ranks" / "speed.json").read_text())
    assert (speed["processes"], speed["images"]) == (2, COUNT - 1)


def test_a_rank_that_dies_loses_nothing_of_the_others(here):
    out = here / "dies"
    process = launch(here, "dies", ranks=2)
    while len(list(out.glob("records/*.json"))) < 6:
        assert process.poll() is None
        time.sleep(0.001)
    workers = [int(pid) for pid in children(process.pid)]
    os.kill(max(workers), signal.SIGKILL)
    assert wait(process).returncode != 0
    before = records(out)
    assert len(before) >= 6
    assert wait(launch(here, "dies", ranks=3)).returncode == 0
    assert results(out) == results(here / "whole")
    done = [int(name.removesuffix(".json")) for name in before if name.endswith(".json")]
    names = [f"{number:03d}.png" for number in done if number != 7]
    assert names
    after = records(out)
    assert [after[name] for name in names] == [before[name] for name in names]


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return file.read().split()


def test_an_error_of_one_rank_ends_all_and_is_told_once(here):
    done = wait(launch(here, "strict", "--strict", ranks=2))
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("dagcore run: error: ")]
    assert len(told) == 1
    assert "007.png cannot be read as an image" in told[0]
    assert not (here / "strict" / "summary.json").exists()
    assert wait(launch(here, "strict", ranks=2)).returncode == 0
    expected = results(here / "whole")
    found = results(here / "strict")
    assert set(found) == set(expected)
    assert [name for name in found if found[name] != expected[name]] == ["settings.toml"]


def test_bad_settings_under_torchrun_are_told_once(here):
    done = wait(launch(here, "bad", "--set", "x/y", ranks=2))
    assert done.returncode != 0
    assert done.stderr.count("dagcore run: error: --set goes with scenes and VOC") == 1
    assert not (here / "bad").exists()
