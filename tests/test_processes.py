"""Processes that end with the one that has started them."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from support import wait_until

import dagcore
from dagcore import processes

# Two workers that say who they are, then wait for ever.
SCRIPT = """
import os, time
from dagcore import processes

def work(_):
    os.write(1, b"%d\\n" % os.getpid())  # at once: the lines of two must not mix
    time.sleep(10**6)

if __name__ == "__main__":
    with processes.pool(2) as pool:
        list(pool.map(work, range(2)))
"""


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent(tmp_path, number):
    (tmp_path / "script.py").write_text(SCRIPT)
    root = os.path.dirname(os.path.dirname(dagcore.__file__))
    with subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        try:
            workers = [int(parent.stdout.readline()) for _ in range(2)]
            assert all(map(alive, workers))
            parent.send_signal(number)
            parent.wait(60)
        finally:
            parent.kill()
    wait_until(lambda: not any(map(alive, workers)), "the workers' end")


def threads_of(_):
    return torch.get_num_threads()


def fail(_):
    raise ValueError("no")


def test_workers_share_the_cores_and_end_on_errors():
    with processes.pool(1) as pool:
        assert list(pool.map(threads_of, [0])) == [processes.cores()]
    with processes.pool(1, threads=3) as pool:
        assert list(pool.map(threads_of, [0])) == [3]
    with pytest.raises(ValueError, match="no"), processes.pool(2) as pool:
        list(pool.map(fail, range(4)))
