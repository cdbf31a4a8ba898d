"""What the engine asks of torch.cuda, on a fake one: the right device, its streams, nothing left.

The device under attack is cuda:1, and cuda:0 is current, as under torchrun.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from fake_cuda import GARBAGE, FakeCUDA, Stream

from dagcore.engine import devices
from dagcore.engine.devices import CUDA, Host, device_for
from dagcore.engine.graph import Graph


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCUDA]:
    devices._capture_stream.cache_clear()
    yield FakeCUDA(monkeypatch)
    devices._capture_stream.cache_clear()


@pytest.fixture
def second(cuda: FakeCUDA) -> CUDA:
    return CUDA(torch.device("cuda", 1))


def test_each_kind_of_device_has_its_object() -> None:
    cuda = device_for(torch.device("cuda", 1))
    assert isinstance(cuda, CUDA)
    assert cuda.device == torch.device("cuda", 1)
    assert not cuda.synchronous
    for device in (None, torch.device("cpu"), torch.device("meta")):
        host = device_for(device)
        assert isinstance(host, Host)
        assert host.synchronous


def test_an_attack_runs_under_its_device(cuda: FakeCUDA, second: CUDA) -> None:
    with second.current():
        assert cuda.current == 1
    assert cuda.current == 0


def test_counts_are_read_once_their_own_device_has_copied_them(
    cuda: FakeCUDA, second: CUDA
) -> None:
    own = Stream(1)
    with cuda.stream(own):  # the thread may work on a stream of its own
        counts = torch.tensor([[3], [4]])
        copy = second.read(counts, counts[0])
    with cuda.stream(own), cuda.device(0):
        other = second.read(counts)
    assert not copy.arrived()
    read = copy.wait()
    assert [one.tolist() for one in read] == [[[3], [4]], [3]]
    assert other.wait()[0].tolist() == [[3], [4]]
    late = second.read(counts)
    assert bool((late.copies[0] == GARBAGE).all())


def test_a_thread_that_helps_works_in_order_with_the_attack(cuda: FakeCUDA, second: CUDA) -> None:
    own, seen = Stream(1), []
    with cuda.stream(own):
        beside = second.beside()

    def help_along() -> None:
        with beside:
            seen.append((cuda.current, cuda.current_stream()))
        seen.append((cuda.current, cuda.current_stream()))

    thread = threading.Thread(target=help_along)
    thread.start()
    thread.join()
    assert seen == [(1, own), (0, cuda.defaults[0])]


def test_samples_wait_in_pinned_memory_of_their_own(
    second: CUDA, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[torch.Tensor] = []

    def pin_memory(value: torch.Tensor) -> torch.Tensor:
        pinned.append(value)
        return value.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    value = torch.ones(3, requires_grad=True)
    assert not second.kept(value).requires_grad
    assert len(pinned) == 1
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: True)  # pinning it is no copy
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda value: value)
    assert second.kept(value).data_ptr() != value.data_ptr()


def test_graphs_are_captured_on_a_stream_of_their_own_device(cuda: FakeCUDA, second: CUDA) -> None:
    first = CUDA(torch.device("cuda", 0))
    seen: list[tuple[int, Stream]] = []

    def iteration() -> None:
        seen.append((cuda.current, cuda.current_stream()))

    for device in (first, second, second):
        replay = device.captured(iteration)
        assert replay is not None
        replay()
    assert [index for index, _ in seen] == [0, 1, 1]
    streams = [stream for _, stream in seen]
    assert [stream.index for stream in streams] == [0, 1, 1]
    assert streams == cuda.captured_on
    assert streams[1] is streams[2]  # each new one would have a workspace of cuBLAS
    assert not set(streams) & set(cuda.defaults)
    assert (cuda.current, cuda.streams) == (0, cuda.defaults)


def synchronises(cuda: FakeCUDA) -> None:
    cuda.invalid = True
    raise RuntimeError("operation not permitted when stream is capturing")


def of_another_kind(cuda: FakeCUDA) -> None:
    raise ValueError("labels must fit")


@pytest.mark.parametrize(
    ("fails", "error"), [(synchronises, RuntimeError), (of_another_kind, ValueError)]
)
def test_a_refused_capture_leaves_nothing_behind(
    cuda: FakeCUDA, second: CUDA, fails: Callable[[FakeCUDA], None], error: type[Exception]
) -> None:
    own = Stream(1)
    with cuda.stream(own), cuda.device(0):
        with pytest.raises(error):
            second.captured(lambda: fails(cuda))
        assert cuda.current == 0
        assert cuda.streams == [cuda.defaults[0], own]
    assert not cuda.allocating
    assert not cuda.pools
    assert not cuda.random_in_capture
    assert second.captured(lambda: None) is not None  # the next attack's


def test_a_refused_capture_is_warned_of_once(cuda: FakeCUDA, second: CUDA) -> None:
    graph, runs = Graph(second), []

    def iteration() -> None:
        runs.append(1)
        synchronises(cuda)

    with pytest.warns(RuntimeWarning, match=r"as a CUDA graph \(operation failed.*capture\): its"):
        assert graph.captured(iteration) is None
    assert graph.captured(iteration) is None
    assert len(runs) == 1


def test_captures_of_several_threads_follow_each_other(cuda: FakeCUDA) -> None:
    both = threading.Barrier(2)
    inside, errors = threading.Event(), []

    def attack(index: int) -> None:
        def iteration() -> None:
            inside.wait(0.05)  # time for the other thread to come in between

        both.wait()
        try:
            assert CUDA(torch.device("cuda", index)).captured(iteration) is not None
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=attack, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(stream.index for stream in cuda.captured_on) == [0, 1]
