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
    done = wait(launch(here, "whole"))
    assert done.returncode == 0, done.stderr
    return here


def launch(here, out, *arguments, **options):
    given = ("--protocol", "two.toml", "--check", "1", *arguments)
    return killing.launch("evaluate", here, out, *given, **options)


def test_killed_before_any_kind_of_write(here):
    expected, out = results(here / "whole"), here / "killed"
    for write in KILLS:
        killed = wait(launch(here, "killed", fate=f"SIGKILL {write} 0"))
        assert killed.returncode == -signal.SIGKILL, write
        kept = results(out)
        whole = {name: data for name, data in kept.items() if not name.startswith("records/")}
        assert whole.items() <= expected.items()
    assert wait(launch(here, "killed")).returncode == 0
    assert results(out) == expected
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]


def test_a_signal_ends_cleanly(here):
    done = wait(launch(here, "signal", fate="SIGTERM os.rename /images/ 3 0"))
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr.splitlines()[-1] == (
        f"dagcore evaluate: SIGTERM after 3 of {COUNT} images: the same command resumes"
    )
    assert wait(launch(here, "signal")).returncode == 0
    assert results(here / "signal") == results(here / "whole")


def test_two_ranks_give_the_same_bytes(here):
    done = wait(launch(here, "ranks", ranks=2))
    assert done.returncode == 0, done.stderr
    assert results(here / "ranks") == results(here / "whole")
    (speed,) = json.loads((here / "ranks" / "speed.json").read_text())
    assert (speed["processes"], speed["images"]) == (2, COUNT - 1)


def test_a_run_is_no_evaluation(here):
    assert wait(killing.launch("run", here, "run", "--max-iter", "1")).returncode == 0
    done = wait(launch(here, "run"))
    assert done.returncode == 2
    assert "run has results of other settings" in done.stderr
