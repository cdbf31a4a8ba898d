"""`dagcore evaluate` that is killed, interrupted, or spread over processes: the same bytes."""

import json
import signal

import killing
import pytest
from killing import results, wait

COUNT = 9
PROTOCOL = """
name = "two"
epsilon = ["2/255", "6/255"]
[[attacks]]
name = "PGD"
attack = "pgd"
steps = 3
[[attacks]]
name = "APGD"
attack = "apgd"
steps = 5
"""
# Everything that an evaluation writes, in its order.
KILLS = (
    "os.rename settings.toml 0",
    "os.rename /images/ 2",
    "open /records/ 2",
    "os.rename /records/ 2",
    "os.rename images.jsonl 0",
    "os.rename summary.json 0",
    "os.rename report.html 0",
    "os.rename report.md 0",
)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a data set, a protocol, and what an evaluation makes of them."""
    here = tmp_path_factory.mktemp("evaluation")
    killing.prepare(here, COUNT)
    (here / "two.toml").write_text(PROTOCOL)
    done = wait(launch(here, "whole", fork=True))
    assert done.returncode == 0, done.stderr
    return here


def launch(here, out, *arguments, **options):
    given = ("--protocol", "two.toml", "--check", "1", *arguments)
    return killing.launch("evaluate", here, out, *given, **options)


def test_killed_before_any_kind_of_write(here):
    expected, out = results(here / "whole"), here / "killed"
    for write in KILLS:
        killed = wait(launch(here, "killed", fate=f"SIGKILL {write} 0", fork=True))
        assert killed.returncode == -signal.SIGKILL, write
        kept = results(out)
        whole = {name: data for name, data in kept.items() if not name.startswith("records/")}
        assert whole.items() <= expected.items()
    assert wait(launch(here, "killed", fork=True)).returncode == 0
    assert results(out) == expected
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]


def test_a_signal_ends_cleanly(here):
    done = wait(launch(here, "signal", fate="SIGTERM os.rename /images/ 3 0", fork=True))
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr.splitlines()[-1] == (
        f"dagcore evaluate: stopped by SIGTERM, 3 of {COUNT} images are done: "
        "run the same command again to resume"
    )
    assert wait(launch(here, "signal", fork=True)).returncode == 0
    assert results(here / "signal") == results(here / "whole")


def test_two_ranks_give_the_same_bytes(here):
    done = wait(launch(here, "ranks", ranks=2))
    assert done.returncode == 0, done.stderr
    assert results(here / "ranks") == results(here / "whole")
    (speed,) = json.loads((here / "ranks" / "speed.json").read_text())
    assert (speed["processes"], speed["images"]) == (2, COUNT - 1)


TWICE = """
import sys
import torch
import dagcore
from dagcore.evaluation.protocols import find_protocol

torch.manual_seed(0)
net = torch.nn.Conv2d(3, 4, 3, padding=1)
rng = torch.Generator().manual_seed(0)
images = [torch.rand(3, 8, 8, generator=rng) for _ in range(5)]
data = [(image, torch.randint(0, 4, (8, 8), generator=rng)) for image in images]
for name in "ab":
    out = f"{sys.argv[1]}-{name}"
    print(dagcore.evaluate(net, data, "two.toml", out=out, check=0)["evaluated"], flush=True)
"""


def test_one_program_evaluates_twice_under_torchrun(here):
    (here / "twice.py").write_text(TWICE)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = killing.wait(killing.start(here, [*torchrun, "twice.py", "twice"]))
    assert done.returncode == 0, done.stderr
    assert "".join(done.stdout_text.split()) == "5555"  # of two evaluations in two processes
    assert results(here / "twice-a") == results(here / "twice-b")


def test_a_run_is_no_evaluation(here):
    run = killing.launch("run", here, "run", "--max-iter", "1", fork=True)
    assert wait(run).returncode == 0
    done = wait(launch(here, "run", fork=True))
    assert done.returncode == 2
    assert "run has results of other settings" in done.stderr
