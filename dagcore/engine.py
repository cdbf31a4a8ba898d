"""The attack loop on the fused ops: `reference.dag` without waiting for the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .labels import assign
from .reference import (
    BUDGET,
    CONVERGED,
    STALLED,
    Trace,
    allowance,
    counted_targets,
    input_gradient,
    step_scale,
    targets,
)

# Called with (update, active targets of each image, -1 where it has stopped).
Callback = Callable[[int, Tensor], None]

LAG = 4  # iterations that a device may be ahead of the host


@contextmanager
def frozen(model: object) -> Iterator[None]:
    """Eval mode and parameters without gradients, both put back afterwards."""
    if not isinstance(model, nn.Module):
        yield
        return
    training = [(module, module.training) for module in model.modules()]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for parameter in learning:
            parameter.requires_grad_(True)


def read_scores(output: Any, images: Tensor) -> Tensor:
    """The scores (N, C, *T) in a model's output: a tensor, {"out": tensor}, or .logits."""
    scores = output
    if isinstance(output, Mapping) and "out" in output:
        scores = output["out"]
    elif not isinstance(output, Tensor) and hasattr(output, "logits"):
        scores = output.logits
    if not isinstance(scores, Tensor):
        raise TypeError(
            "model must return scores as a tensor, a mapping with 'out' or an object with .logits, "
            f"got {type(output).__name__}"
        )
    if scores.dim() < 2 or len(scores) != len(images):
        raise ValueError(
            f"model must return scores of shape ({len(images)}, C, *targets) for "
            f"{len(images)} images, got {tuple(scores.shape)}"
        )
    return scores


def run(
    scores_of: Callable[[Tensor], Tensor],
    images: Tensor,  # (N, *)
    labels: Tensor,  # (N, *T)
    adversarial_labels: Tensor | str,  # (N, *T)
    *,
    gamma: float,
    max_iter: int,
    goal: str,
    bounds: tuple[float, float] | None,
    epsilon: float | None,
    tolerance: float,
    ignore_index: int,
    generator: torch.Generator | None,
    callback: Callback | None = None,
) -> Trace:
    """Algorithm 1 for each image of a batch. Arguments and result as for `reference.dag`."""
    lower, upper = bounds or (None, None)
    x = images.detach().clone()
    count, device = len(x), x.device
    running = torch.ones(count, dtype=torch.bool, device=device)
    iterations = torch.zeros(count, dtype=torch.int32, device=device)
    status = torch.full((count,), BUDGET, dtype=torch.int8, device=device)
    history = torch.full((max_iter + 1, count), -1, dtype=torch.int32, device=device)
    allowed = torch.zeros(count, device=device)
    watch = Watch(device, callback)

    for m in range(max_iter + 1):
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            scores = scores_of(leaf)
        if m == 0:
            num_classes = scores.shape[1]
            adversarial_labels = assign(
                adversarial_labels, labels, num_classes, ignore_index, generator
            )
            if device.type != "cpu":  # there the op itself does not look
                drawn = adversarial_labels if isinstance(adversarial_labels, Tensor) else None
                counted_targets(scores, labels, drawn, ignore_index)
            if tolerance:
                allowed = allowance(
                    targets(scores, labels, adversarial_labels, goal, ignore_index), tolerance
                )
        seed, active = ops.dag_seed(
            scores, labels, adversarial_labels, goal=goal, ignore_index=ignore_index
        )
        history[m] = torch.where(running, active, -1)
        converged = running & (active <= allowed)
        status.masked_fill_(converged, CONVERGED)
        running = running & ~converged
        if watch.all_stopped(m, history[m], running) or m == max_iter:
            break
        gradient = input_gradient(scores, leaf, seed)
        del scores, seed, leaf  # not to be held through the next forward pass
        norms = ops.linf_step_(
            x,
            images,
            gradient,
            torch.where(running, active, 0),
            gamma=gamma,
            lower=lower,
            upper=upper,
            epsilon=epsilon,
        )
        moved = step_scale(norms, gamma) > 0
        status.masked_fill_(running & ~moved, STALLED)
        running = running & moved
        iterations += running

    watch.finish()
    drawn = adversarial_labels if isinstance(adversarial_labels, Tensor) else None
    return Trace(x, iterations, status, history, drawn)


class Watch:
    """Which images have stopped, read back as late as the device likes.

    On the CPU the answer is there at once. Elsewhere each iteration's counts are copied behind its
    kernels, and looked at when the copy is done; the host waits only to stay within LAG iterations.
    An image that has stopped is not touched any more, so lateness changes no result.
    """

    def __init__(self, device: torch.device, callback: Callback | None) -> None:
        self.device = device
        self.callback = callback
        self.under_way: deque[tuple[int, Tensor, Tensor, torch.Event]] = deque()

    def all_stopped(self, m: int, counts: Tensor, running: Tensor) -> bool:
        """Note iteration m's counts and running images, (N,); True once none runs any more."""
        if self.device.type == "cpu":
            return self._report(m, counts, running)
        event = torch.Event(self.device)
        copies = [self._to_host(t) for t in (counts, running)]
        event.record()
        self.under_way.append((m, copies[0], copies[1], event))
        stopped = False
        while self.under_way and (len(self.under_way) > LAG or self.under_way[0][3].query()):
            stopped |= self._next()
        return stopped

    def finish(self) -> None:
        """Report what is still under way."""
        while self.under_way:
            self._next()

    def _to_host(self, tensor: Tensor) -> Tensor:
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor, non_blocking=True)

    def _next(self) -> bool:
        m, counts, running, event = self.under_way.popleft()
        event.synchronize()
        return self._report(m, counts, running)

    def _report(self, m: int, counts: Tensor, running: Tensor) -> bool:
        if self.callback is not None and bool((counts >= 0).any()):
            self.callback(m, counts.clone())
        return not bool(running.any())
