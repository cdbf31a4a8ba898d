"""What only a GPU can show: kernels against the CPU's, the engine without synchronisation, graphs.

`test_kernels` is small and covers every kernel: benchmarks/gpu_check.sh runs it under
compute-sanitizer.
"""

from __future__ import annotations

import pytest
import torch
from every_kernel import assert_same_results, in_every_case, results
from torch import Tensor, nn

from dagcore import DAG, Sample, ops
from dagcore.attacks.base import open_slots
from dagcore.engine.loop import EAGER, Slots
from dagcore.engine.networks import Targets


@in_every_case
def test_kernels(
    cuda: torch.device, layout: str, mode: str, dtype: torch.dtype, size: tuple[int, int]
) -> None:
    case = (layout, mode, dtype, size)
    assert_same_results(results(cuda, *case), results(torch.device("cpu"), *case))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, stride=2), nn.Tanh(), nn.Conv2d(16, 7, 3, padding=1)
        )

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.layers(4 * images)
        return scores


def case(device: torch.device, count: int = 4) -> tuple[Net, Tensor, Tensor]:
    model = Net().to(device).double()
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(count, 3, 24, 32, generator=generator, dtype=torch.float64).to(device)
    with torch.no_grad():
        labels = ops.argmax_bilinear(model(images), (24, 32))
    return model, images, labels


ATTACK = DAG(gamma=0.02, max_iter=20, tolerance=0.3)


def test_attack_equals_the_cpu(cuda: torch.device) -> None:
    model, images, labels = case(cuda)
    there = ATTACK(model, images, labels, "runner-up")
    here = ATTACK(model.cpu(), images.cpu(), labels.cpu(), "runner-up")
    assert there.status == here.status
    assert torch.equal(there.iterations.cpu(), here.iterations)
    torch.testing.assert_close(there.adversarial.cpu(), here.adversarial)


def test_stream_equals_a_batch(cuda: torch.device) -> None:
    model, images, labels = case(cuda, 9)
    samples = [
        Sample(image.cpu(), of.cpu(), "runner-up", key=k)
        for k, (image, of) in enumerate(zip(images, labels, strict=True))
    ]
    got = {result.key: result for result in ATTACK.stream(model, samples, 3)}
    assert sorted(got) == list(range(9))
    batch = ATTACK(model, images, labels, "runner-up")
    for k, result in got.items():
        assert torch.equal(result.active[:, 0], batch.active[:, k])
        torch.testing.assert_close(result.adversarial[0], batch.adversarial[k])


def slots_of(device: torch.device) -> Slots:
    model, images, labels = case(device)
    attack = DAG(gamma=1e-9, max_iter=10**4)
    targets = Targets(labels, lambda labels, classes: (labels + 1) % classes)
    return open_slots(attack, [attack.network(model)], images, [targets])


def is_captured(device: torch.device) -> bool:
    """Whether iterations there are captured as a graph; they do what they should in any case."""
    slots = slots_of(device)
    with slots.device.current():
        for _ in range(EAGER + 3):
            slots.iterate()
        assert not slots.finished(wait=True)
    assert slots.state["updates"].tolist() == [EAGER + 3] * 4
    return slots.graph.replay is not None


def test_iterations_are_captured_as_a_graph(cuda: torch.device) -> None:
    assert is_captured(cuda)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_a_model_that_synchronises_is_run_eagerly(cuda: torch.device) -> None:
    slots = slots_of(cuda)
    (network,) = slots.evaluator.parts
    inner = network.model.model

    def synchronising(images: Tensor) -> Tensor:
        assert float(images.sum()) > 0
        scores: Tensor = inner(images)
        return scores

    network.model.model = synchronising
    for _ in range(EAGER):
        slots.iterate()
    stream = torch.cuda.current_stream(cuda)
    with pytest.warns(RuntimeWarning, match="cannot be captured as a CUDA graph"):
        slots.iterate()
    assert torch.cuda.current_stream(cuda) == stream
    torch.rand(3, device=cuda)  # the generator is not left in the capture
    slots.iterate()
    assert slots.state["updates"].tolist() == [EAGER + 2] * 4
    assert is_captured(cuda)  # the next attack's


def test_a_device_that_is_not_the_current_one(cuda: torch.device) -> None:
    last = torch.cuda.device_count() - 1
    if last == 0:
        pytest.skip("one GPU alone: none that is not the current one")
    assert torch.cuda.current_device() == 0
    there = torch.device("cuda", last)
    assert is_captured(cuda)
    assert is_captured(there)
    test_attack_equals_the_cpu(there)
    test_stream_equals_a_batch(there)
    assert torch.cuda.current_device() == 0


def test_iterations_do_not_synchronise(cuda: torch.device) -> None:
    slots = slots_of(cuda)
    for _ in range(EAGER + 2):
        slots.iterate()
        slots.finished()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            slots.iterate()
            slots.finished()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_admission_does_not_synchronise(cuda: torch.device) -> None:
    slots = slots_of(cuda)
    slots.iterate()
    slots.release([1])
    image, labels = torch.rand_like(slots.state["x"][:1]), slots.evaluator.states[0]["labels"][:1]
    for kind in ("permutation", "random"):
        torch.cuda.set_sync_debug_mode("error")
        try:
            taken = slots.admit([kind], image)
            slots.evaluator.admit(taken, [Targets(labels, ATTACK.assign(kind, None))])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert taken == slice(1, 2)
        slots.release([1])


def test_labels_out_of_range_are_reported_late(cuda: torch.device) -> None:
    model, images, labels = case(cuda)
    labels[2, 3, 4] = 99
    with pytest.raises(ValueError, match=r"labels must lie in .* got 99"):
        ATTACK(model, images, labels, torch.zeros_like(labels))
