"""One perturbation for several networks."""

import pytest
import torch
from support import generator
from torch import nn

import dagcore
from dagcore import DAG, Part, Sample, Status, joint_attack, joint_stream, victims, zoo

SHAPE = (3, 3, 16, 20)


def network(seed, classes=5, stride=1):
    net = nn.Conv2d(3, classes, max(stride, 1), stride=stride)
    rng = generator(seed)
    net.weight.data = torch.randn(net.weight.shape, generator=rng)
    net.weight.data -= net.weight.data.mean((1, 2, 3), keepdim=True)
    net.bias.data.zero_()
    return net


def some_images():
    return torch.rand(SHAPE, generator=generator(0)) * 0.8 + 0.1


def seen(net, images):
    with torch.no_grad():
        return net(images).argmax(1)


def test_one_part_is_the_attack_itself():
    net, images = network(1), some_images()
    labels = seen(net, images)
    adversarial = (labels + 1) % 5
    attack = DAG(max_iter=40)
    alone = attack(net, images, labels, adversarial)
    joint = joint_attack(attack, [Part(net, labels, adversarial)], images)
    assert torch.equal(joint.active[:, 0], alone.active)
    assert torch.equal(joint.iterations, alone.iterations)
    assert joint.status == alone.status
    assert torch.equal(joint.targets[0], alone.targets)
    torch.testing.assert_close(joint.adversarial, alone.adversarial, rtol=0, atol=1e-6)
    assert torch.equal(joint.perturbation, joint.adversarial - images)


def test_an_update_is_the_sum_of_normalised_gradients():
    nets, images = [network(1), network(2, classes=7, stride=2)], some_images()
    labels = [seen(net, images) for net in nets]
    aims = [(own + 1) % 5 for own in labels]
    attack = DAG(max_iter=1, bounds=None)
    joint = joint_attack(
        attack, [Part(*part) for part in zip(nets, labels, aims, strict=True)], images
    )
    x = images.clone().requires_grad_()
    total = torch.zeros(SHAPE)
    for net, own, aim in zip(nets, labels, aims, strict=True):
        scores = net(x)
        gain = scores.gather(1, aim[:, None]) - scores.gather(1, own[:, None])
        (gradient,) = torch.autograd.grad(gain.sum(), x)
        total += gradient / gradient.abs().amax((1, 2, 3), keepdim=True)
    expected = attack.gamma * total / total.abs().amax((1, 2, 3), keepdim=True)
    torch.testing.assert_close(joint.perturbation, expected, rtol=1e-4, atol=1e-7)


def test_all_networks_are_fooled_by_the_same_image():
    nets, images = [network(1), network(2, classes=7)], some_images()
    parts = [Part(net, seen(net, images)) for net in nets]
    joint = joint_attack(DAG(gamma=2 / 255), parts, images, generator=generator(3))
    assert set(joint.status) == {Status.CONVERGED}
    for k, (net, part) in enumerate(zip(nets, parts, strict=True)):
        assert not bool((seen(net, joint.adversarial) == part.labels).any())
        for n, m in enumerate(joint.iterations.tolist()):
            assert joint.active[m, k, n] == 0
            assert bool((joint.active[m + 1 :, k, n] == -1).all())
    again = joint_attack(DAG(gamma=2 / 255), parts, images, generator=generator(3))
    assert torch.equal(again.adversarial, joint.adversarial)


def test_different_masks_on_two_networks():
    nets, images = [network(1, stride=2), network(2, stride=2)], some_images()
    masks = [torch.full((3, 8, 10), 1), torch.full((3, 8, 10), 2)]
    masks[0][:, 2:6] = 3
    parts = [Part(net, mask, mask, goal="reach") for net, mask in zip(nets, masks, strict=True)]
    joint = joint_attack(DAG(gamma=4 / 255, max_iter=150, bounds=None), parts, images)
    shares = [
        float((seen(net, joint.adversarial) == mask).float().mean())
        for net, mask in zip(nets, masks, strict=True)
    ]
    assert min(shares) > 0.95


def test_a_segmenter_and_a_detector_at_once():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 64, 96, generator=generator(1))
    segmenter = victims.prepare(zoo.build("FCN-VGG", num_classes=5, width=1 / 16).eval())
    detector = victims.detector(
        zoo.build("FR-ZF-07", num_classes=5, width=1 / 16, min_size=64).eval()
    )
    boxes = torch.tensor([[[4.0, 4, 40, 40], [20, 10, 90, 60]]]).expand(2, 2, 4).contiguous()
    parts = []
    for model, own in ((segmenter, None), (detector, boxes)):
        with torch.no_grad():
            scores = model(images) if own is None else model(images, own)
        labels = scores.argmax(1)
        parts.append(Part(model, labels, (labels + 1) % 5, boxes=own))
    joint = joint_attack(DAG(max_iter=5), parts, images)
    assert int(joint.active[0].min()) > 0
    assert bool((joint.iterations > 0).all())


def test_stalled_and_untargeted_images():
    flat = nn.Conv2d(3, 2, 1)
    flat.weight.data.zero_()
    flat.bias.data.copy_(torch.tensor([1.0, 0.0]))
    images, labels = some_images(), torch.zeros(3, 16, 20, dtype=torch.int64)
    labels[1] = 255
    joint = joint_attack(DAG(max_iter=3), [Part(flat, labels, 1 - labels.clamp(max=1))], images)
    assert joint.status == (Status.STALLED, Status.CONVERGED, Status.STALLED)
    assert joint.targets.tolist() == [[320, 0, 320]]
    assert torch.equal(joint.adversarial, images)
    none = joint_attack(DAG(max_iter=3), [Part(flat, labels[:0], labels[:0])], images[:0])
    assert none.adversarial.shape == (0, 3, 16, 20)


def test_bad_input():
    net, images = network(1), some_images()
    labels = seen(net, images)
    with pytest.raises(ValueError, match="parts must have at least one network"):
        joint_attack(DAG(), [], images)
    with pytest.raises(ValueError, match=r"parts\[1\]: labels must have one map"):
        joint_attack(DAG(), [Part(net, labels), Part(net, labels[:2])], images)
    with pytest.raises(ValueError, match=r"parts\[0\]: boxes must have one entry for each of 3"):
        joint_attack(DAG(), [Part(net, labels, boxes=torch.zeros(4, 2))], images)
    with pytest.raises(ValueError, match=r"parts\[0\]: adversarial_labels must be a tensor, 'p"):
        joint_attack(DAG(), [Part(net, labels, "runner-up", goal="reach")], images)
    assert dagcore.joint_attack is joint_attack


@pytest.mark.parametrize("slots", [1, 2])
def test_a_stream_gives_each_image_what_it_gets_alone(slots):
    nets, images = [network(1), network(2, classes=7, stride=2)], some_images()
    labels = [seen(net, images) for net in nets]
    attack = DAG(gamma=2 / 255, max_iter=60, tolerance=0.1)
    samples = [
        Sample(images[n], [own[n] for own in labels], ["runner-up", None], key=n) for n in range(3)
    ]
    heard = []
    results = joint_stream(
        attack,
        [Part(net) for net in nets],
        samples,
        slots=slots,
        generator=generator(4),
        callback=lambda keys, counts: heard.append((list(keys), counts.shape)),
    )
    found = {result.key: result for result in results}
    assert sorted(found) == [0, 1, 2]
    for n, result in found.items():
        parts = [
            Part(net, own[n : n + 1], aims)
            for net, own, aims in zip(nets, labels, result.adversarial_labels, strict=True)
        ]
        alone = joint_attack(attack, parts, images[n : n + 1])
        assert result.adversarial_labels[0] == "runner-up"
        assert torch.equal(result.active, alone.active)
        assert torch.equal(result.targets, alone.targets)
        torch.testing.assert_close(result.adversarial, alone.adversarial, rtol=0, atol=1e-6)
    assert {shape[1] for _, shape in heard} == {2}
    assert {key for keys, _ in heard for key in keys} == {0, 1, 2}


def test_a_callback_hears_of_every_network():
    nets, images = [network(1), network(2)], some_images()
    heard = {}
    joint = joint_attack(
        DAG(max_iter=4),
        [Part(net, seen(net, images)) for net in nets],
        images,
        generator=generator(3),
        callback=lambda m, active: heard.update({m: active.clone()}),
    )
    for m, active in heard.items():
        assert torch.equal(active, joint.active[m])
    assert len(heard) == int(joint.iterations.max()) + 1


def test_a_result_goes_on_from_where_it_stopped():
    nets, images = [network(1), network(2)], some_images()
    parts = [Part(net, seen(net, images)) for net in nets]
    whole = joint_attack(DAG(max_iter=6), parts, images, generator=generator(3))
    first = joint_attack(DAG(max_iter=2), parts, images, generator=generator(3))
    again = [
        Part(part.model, part.labels, aims)
        for part, aims in zip(parts, first.adversarial_labels, strict=True)
    ]
    rest = joint_attack(DAG(max_iter=4), again, images, start=first.adversarial)
    torch.testing.assert_close(rest.adversarial, whole.adversarial)


def test_bad_samples_of_a_stream():
    net, images = network(1), some_images()
    labels = seen(net, images)
    with pytest.raises(TypeError, match="labels must be a sequence with an entry for each of 2"):
        list(joint_stream(DAG(), [Part(net)] * 2, [Sample(images[0], [labels[0]])]))
    with pytest.raises(ValueError, match=r"parts\[0\]: labels must be None"):
        joint_stream(DAG(), [Part(net, labels)], [])


def test_known_scores_are_those_of_one_network():
    nets, images = [network(1), network(2)], some_images()
    labels = [seen(net, images)[0] for net in nets]
    leaf = images[:1].clone().requires_grad_()
    plain = Sample(images[0], labels, ["runner-up"] * 2, key=0)
    known = Sample(images[0], labels, ["runner-up"] * 2, key=0, known=(leaf, nets[0](leaf)))
    parts, attack = [Part(net) for net in nets], DAG(max_iter=3)
    (expected,), (result,) = (list(joint_stream(attack, parts, [one])) for one in (plain, known))
    assert torch.equal(result.adversarial, expected.adversarial)
