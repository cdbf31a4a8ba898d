"""`dagcore run` that is killed, interrupted, run twice, out of space, or spread over processes."""

import json
import os
import resource
import signal

import killing
import pytest
from killing import results, wait
from support import wait_until

COUNT = 24


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a data set, one of whose images is broken, and what a run makes of it."""
    here = tmp_path_factory.mktemp("run")
    killing.prepare(here, COUNT)
    done = wait(launch(here, "whole", fork=True))
    assert done.returncode == 0, done.stderr
    assert len(results(here / "whole")) == COUNT - 1 + COUNT - 1 + 4 + 3  # images, r, figures, rest
    return here


def launch(here, out, *arguments, **options):
    given = ("--max-iter", "12", "--perturbations", *arguments)
    return killing.launch("run", here, out, *given, **options)


def images_of(names, ending):
    """The numbers of images among the names of their files."""
    return {int(name.removesuffix(ending)) for name in names if name.endswith(ending)}


def records(out):
    """When the record of each image was written, and its image."""
    return {
        path.name: path.stat().st_mtime_ns
        for kind in ("records", "images")
        for path in (out / kind).glob("[0-9]*")
    }


# Everything that a run writes, in the order of a run; the third image of each.
KILLS = (
    "os.rename settings.toml 0",
    "os.rename /figures/ 2",
    "os.rename /images/ 2",
    "os.rename /perturbations/ 2",
    "open /records/ 2",
    "os.rename /records/ 2",
    "os.rename images.jsonl 0",
    "os.rename summary.json 0",
)


def test_killed_before_any_kind_of_write(here):
    expected, out = results(here / "whole"), here / "killed"
    for write in KILLS:
        before = records(out)
        killed = wait(launch(here, "killed", fate=f"SIGKILL {write} 0", fork=True))
        assert killed.returncode == -signal.SIGKILL
        partial = results(out)
        kept = {name: data for name, data in partial.items() if not name.startswith("records/")}
        assert kept.items() <= expected.items()  # whole files only, and the right ones
        done = images_of(before, ".json") - {7}
        after = records(out)
        for number in done:  # nothing is done again
            for name in (f"{number:08d}.json", f"{number:03d}.png"):
                assert before[name] == after[name]
        for number in images_of(after, ".json") - {7}:  # a record comes last
            assert f"{number:03d}.png" in after
            assert f"perturbations/{number:03d}.safetensors" in partial
    assert len(done) == COUNT - 1
    assert wait(launch(here, "killed", fork=True)).returncode == 0
    assert results(out) == expected
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]


def test_a_signal_ends_cleanly_and_says_how_to_go_on(here):
    out, have = here / "signals", 0
    for number in (signal.SIGINT, signal.SIGTERM):
        before = have
        done = wait(
            launch(here, "signals", fate=f"{number.name} os.rename /images/ 3 0", fork=True)
        )
        assert done.returncode == 128 + number
        have = len(list(out.glob("records/*.json")))
        assert before + 3 <= have < COUNT
        assert done.stderr.splitlines()[-1] == (
            f"dagcore run: stopped by {number.name}, {have} of {COUNT} images are done: "
            "run the same command again to resume"
        )
        assert "Traceback" not in done.stderr
        assert not [path for path in out.rglob(".*") if path.name != ".lock"]
    assert wait(launch(here, "signals", fork=True)).returncode == 0
    assert results(out) == results(here / "whole")


def test_a_second_run_on_the_same_folder_is_refused(here):
    out = here / "twice"
    # The first stays at work while the second looks.
    first = launch(here, "twice", fate="SIGSTOP os.rename /records/ 1 0")
    try:
        wait_until(lambda: has_stopped(first), "the first run")
        second = wait(launch(here, "twice"))
    finally:
        first.send_signal(signal.SIGCONT)
    assert second.returncode == 2
    assert "another run is using it (process " in second.stderr
    assert f"process {first.pid} on " in second.stderr
    assert wait(first).returncode == 0
    assert results(out) == results(here / "whole")


def has_stopped(process):
    """Whether a process has been stopped; fails if it has ended."""
    state = os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT
    found = os.waitid(os.P_PID, process.pid, state)
    assert found is None or found.si_code == os.CLD_STOPPED, process.communicate()
    return found is not None


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
    assert wait(launch(here, "full", fork=True)).returncode == 0
    assert results(out) == results(here / "whole")


def test_two_ranks_give_the_same_bytes(here):
    done = wait(launch(here, "ranks", ranks=2))
    assert done.returncode == 0, done.stderr
    assert results(here / "ranks") == results(here / "whole")
    (speed,) = json.loads((here / "ranks" / "speed.json").read_text())
    assert (speed["processes"], speed["images"]) == (2, COUNT - 1)


def test_a_rank_that_dies_loses_nothing_of_the_others(here):
    out = here / "dies"
    died = wait(launch(here, "dies", ranks=2, fate="SIGKILL os.rename /records/ 2 1"))
    assert died.returncode != 0
    before = records(out)
    assert not (out / "summary.json").exists()
    assert wait(launch(here, "dies", fork=True)).returncode == 0
    assert results(out) == results(here / "whole")
    names = [f"{number:03d}.png" for number in images_of(before, ".json") - {7}]
    assert names
    after = records(out)
    assert [after[name] for name in names] == [before[name] for name in names]


def test_an_error_of_one_rank_ends_all_and_is_told_once(here):
    done = wait(launch(here, "strict", "--strict", ranks=2))
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("dagcore run: error: ")]
    assert len(told) == 1
    assert "007.png cannot be read as an image" in told[0]
    assert not (here / "strict" / "summary.json").exists()
    assert wait(launch(here, "strict", fork=True)).returncode == 0
    expected = results(here / "whole")
    found = results(here / "strict")
    assert set(found) == set(expected)
    assert [name for name in found if found[name] != expected[name]] == ["settings.toml"]


def test_bad_settings_under_torchrun_are_told_once(here):
    done = wait(launch(here, "bad", "--set", "x/y", ranks=2))
    assert done.returncode != 0
    assert done.stderr.count("dagcore run: error: --set requires scenes or VOC") == 1
    assert not (here / "bad").exists()
