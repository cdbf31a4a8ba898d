"""One perturbation for many images."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from support import generator
from torch import nn

from dagcore import DAG, Sample, Status, universal_perturbation
from dagcore.perturbation import fit


def network(seed=1, classes=5):
    net = nn.Conv2d(3, classes, 1)
    net.weight.data = torch.randn(net.weight.shape, generator=generator(seed))
    net.weight.data -= net.weight.data.mean((1, 2, 3), keepdim=True)
    net.bias.data.zero_()
    return net


def seen(net, images):
    with torch.no_grad():
        return net(images).argmax(1)


def some_samples(net, count=4, size=(12, 16), adversarial="runner-up"):
    images = torch.rand((count, 3, *size), generator=generator(0)) * 0.8 + 0.1
    labels = seen(net, images)
    return [Sample(*pair, adversarial) for pair in zip(images, labels, strict=True)]


def test_an_update_is_the_sum_of_the_images_normalised_gradients():
    net = network()
    samples = some_samples(net, 3)
    attack = DAG(max_iter=1)
    made = universal_perturbation(attack, net, samples, batch_size=3)
    total = torch.zeros(3, 12, 16)
    for sample in samples:
        x = sample.image[None].clone().requires_grad_()
        scores = net(x)
        best, second = scores.topk(2, 1).indices.split(1, 1)
        assert torch.equal(best[:, 0], sample.labels[None])
        gain = scores.gather(1, second) - scores.gather(1, best)
        (gradient,) = torch.autograd.grad(gain.sum(), x)
        total += gradient[0] / gradient.abs().max()
    expected = attack.gamma * total / total.abs().max()
    torch.testing.assert_close(made.perturbation[0], expected, rtol=1e-4, atol=1e-7)
    assert made.iterations.tolist() == [1]
    assert made.active[0].tolist() == made.targets.tolist() == [3 * 12 * 16]
    assert made.active.shape == (2, 1)


def test_one_perturbation_fools_every_image():
    net = network()
    # Images of one colour each, and labels that one direction takes all of them away from.
    images = torch.rand(6, 3, 1, 1, generator=generator(2)).mul(0.2).add(0.4).expand(6, 3, 8, 8)
    samples = [
        Sample(image, labels, "runner-up")
        for image, labels in zip(images, seen(net, images), strict=True)
    ]
    made = universal_perturbation(DAG(max_iter=400), net, samples, batch_size=4)
    assert 0 < int(made.iterations) < 400
    assert made.status == (Status.CONVERGED,)
    assert int(made.active[int(made.iterations)]) == 0
    for sample in samples:
        moved = (sample.image + made.perturbation[0]).clamp(0, 1)
        assert not bool((seen(net, moved[None])[0] == sample.labels).any())


def test_epsilon_limits_the_perturbation():
    net = network()
    made = universal_perturbation(DAG(max_iter=60, epsilon=4 / 255), net, some_samples(net))
    largest = float(made.perturbation.abs().max())
    assert largest == pytest.approx(4 / 255)
    assert made.iterations == 60
    assert 0 < made.perceptibility <= 4 / 255 * 3**0.5


def test_one_permutation_of_the_classes_holds_for_all():
    net, samples = network(classes=7), some_samples(network(classes=7), 5, adversarial=None)
    samples[1].labels[0, 0] = 255
    made = universal_perturbation(DAG(max_iter=2), net, samples, generator=generator(3))
    table = made.adversarial_labels
    assert torch.equal(table.sort().values, torch.arange(7))
    assert not bool((table == torch.arange(7)).any())
    given = [
        dataclasses.replace(
            one,
            adversarial_labels=torch.where(one.labels == 255, 255, table[one.labels.clamp(max=6)]),
        )
        for one in samples
    ]
    same = universal_perturbation(DAG(max_iter=2), net, given)
    assert torch.equal(same.perturbation, made.perturbation)
    assert same.adversarial_labels == "given"


class Lazy(Sequence):
    """Samples that are made anew at each look."""

    def __init__(self, samples):
        self.samples, self.reads = samples, []

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        self.reads.append(index)
        return self.samples[index]


def test_each_sample_is_read_once_a_round():
    net = network()
    lazy, heard = Lazy(some_samples(net, 5)), []
    made = universal_perturbation(
        DAG(max_iter=6),
        net,
        lazy,
        batch_size=2,
        callback=lambda look, active: heard.append((look, active.tolist())),
    )
    looks = [0, 1, 2, 3, 4] * 3  # three batches a round
    assert lazy.reads == looks[: len(lazy.reads)]
    assert len(lazy.reads) == 5 + 5 + 2  # six updates and the last evaluation
    assert [look for look, _ in heard] == list(range(7))
    assert [count for _, (count,) in heard] == made.active[:, 0].tolist()
    assert made.status == (Status.BUDGET,)
    assert made.targets.tolist() == [5 * 12 * 16]


def test_images_of_several_sizes_share_the_upper_left_part():
    net = network()
    samples = [*some_samples(net, 2, (8, 16)), *some_samples(net, 1, (12, 10))]
    made = universal_perturbation(DAG(max_iter=3), net, samples)
    assert made.perturbation.shape == (1, 3, 12, 16)
    (r,) = made.perturbation
    assert float(r[:, 8:, 10:].abs().max()) == 0  # no image reaches there
    assert float(r[:, 8:, :10].abs().max()) > 0
    assert float(r[:, :8, 10:].abs().max()) > 0


def test_fit():
    r = torch.arange(24.0).view(1, 2, 3, 4)
    assert torch.equal(fit(r, (2, 3)), r[:, :, :2, :3])
    larger = fit(r, (4, 5))
    assert larger.shape == (1, 2, 4, 5)
    assert torch.equal(larger[:, :, :3, :4], r)
    assert float(larger.abs().sum()) == float(r.abs().sum())
    with pytest.raises(ValueError, match="perturbation must have shape"):
        fit(r[0], (2, 3))
    with pytest.raises(ValueError, match=r"size must be \(height, width\)"):
        fit(r, (2,))


def test_a_dead_gradient_ends_it():
    def flat(x):
        return torch.ones(len(x), 3, *x.shape[2:]) + 0 * x[:, :1]

    sample = Sample(torch.full((3, 4, 4), 0.5), torch.zeros(4, 4, dtype=torch.int64))
    made = universal_perturbation(DAG(), flat, [sample])
    assert made.status == (Status.STALLED,)
    assert made.iterations.tolist() == [0]
    assert not bool(made.perturbation.any())


def test_a_batch_without_a_gradient_does_not_end_it():
    net = nn.Sequential(nn.Threshold(0.5, 0.0), network())
    dark, live = torch.full((3, 4, 4), 0.1), torch.rand((3, 4, 4), generator=generator(5)) / 2 + 0.5
    samples = [Sample(image, seen(net, image[None])[0], "runner-up") for image in (dark, live)]
    alone = universal_perturbation(DAG(max_iter=5), net, samples[1:], batch_size=1)
    both = universal_perturbation(DAG(max_iter=5), net, samples, batch_size=1)
    assert 0 < int(alone.iterations) == int(both.iterations)
    assert torch.equal(both.perturbation, alone.perturbation)


def test_the_model_is_put_back():
    net = network().train()
    universal_perturbation(DAG(max_iter=1), net, some_samples(net))
    assert net.training
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"samples": []}, ValueError, "samples must have at least one image, got none"),
        ({"samples": [3]}, TypeError, r"samples\[0\] must be a dagcore.Sample, got int"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"labels": torch.zeros(3, 3)}, TypeError, r"samples\[0\]: labels must be uint8"),
        ({"image": torch.full((3, 12, 16), 2.0)}, ValueError, r"samples\[0\]: images must lie"),
        ({"start": torch.zeros(3, 12, 16)}, ValueError, r"samples\[0\]: start must be None"),
        ({"boxes": 3}, TypeError, "boxes must be a torch.Tensor"),
    ],
)
def test_bad_input(change, error, message):
    net = network()
    (sample,) = some_samples(net, 1)
    fields = {"image": sample.image, "labels": sample.labels, "start": None}
    fields |= {k: v for k, v in change.items() if k in ("image", "labels", "start", "boxes")}
    arguments = {"samples": [Sample(**fields)]}
    arguments |= {k: v for k, v in change.items() if k in ("samples", "batch_size")}
    with pytest.raises(error, match=message):
        universal_perturbation(DAG(), net, **arguments)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_255_is_a_class_where_another_label_is_ignored(dtype):
    net = network(classes=256)
    image = torch.rand(3, 4, 4, generator=generator(1)) * 0.8 + 0.1
    sample = Sample(image, torch.full((4, 4), 255, dtype=dtype))
    made = universal_perturbation(DAG(max_iter=0, ignore_index=-1), net, [sample])
    assert made.targets.tolist() == [16]
