"""Scores as networks return them: one logit, probabilities, classes last, fixed sizes."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support import generator, shaken
from torch import nn

import dagcore
from dagcore import DAG, Sample, Status, victims
from dagcore.engine import ScoreModel, read_scores
from dagcore.engine.scores import AlignedScores


def some_images(size=(24, 32), count=2):
    return torch.rand(count, 3, *size, generator=generator(1))


def network(classes=4, stride=1):
    torch.manual_seed(2)
    return shaken(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, stride, 1),
            nn.BatchNorm2d(8),
            nn.SiLU(),
            nn.Conv2d(8, classes, 1),
        )
    )


def labels_of(model, images, align_corners=False):
    scores = read_scores(model(images), images).detach().as_subclass(torch.Tensor)
    return dagcore.ops.argmax_bilinear(scores, images.shape[2:], align_corners=align_corners)


# --- one logit


@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_one_logit_is_two_classes(threshold):
    model, images = network(1), some_images()
    victim = victims.binary(model, threshold)
    assert not victim.training
    decided = model(images)[:, 0].sigmoid() > threshold
    assert 0 < int(decided.sum()) < decided.numel()
    assert torch.equal(victim(images).argmax(1) == 1, decided)
    on_it = victims.binary(lambda x: torch.zeros(1, 1, 2, 2))
    assert not bool(on_it(images[:1]).argmax(1).any())


@pytest.mark.parametrize("form", ["full size", "low resolution", "prepared", "prepared inside"])
def test_one_logit_is_attacked(form):
    images = some_images()
    victim = victims.binary(network(1, stride=1 if form == "full size" else 4))
    if form == "prepared":
        victim = victims.prepare(victim)
        assert victim.preparation.folded == 1
        assert victim.classes == ("background", "object")
    elif form == "prepared inside":
        victim = victims.binary(victims.prepare(victim.network))
    labels = labels_of(victim, images)
    result = DAG(gamma=2 / 255, max_iter=30)(victim, images, labels, "runner-up")
    assert result.active[0].tolist() == [24 * 32] * 2
    left = labels_of(victim, result.adversarial) == labels
    assert torch.equal(left.sum((1, 2)).int(), result.active[result.iterations, [0, 1]])
    assert int(left.sum()) < labels.numel()


def test_one_logit_in_the_networks_that_are_understood():
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = shaken(smp.Unet("resnet18", encoder_weights=None, classes=1))
    low = victims.low_resolution(victims.binary(model))
    images = some_images((64, 64), 1)
    torch.testing.assert_close(low(images)[:, 1:], model(images))
    assert not low.align_corners


@pytest.mark.parametrize("adversarial", ["runner-up", "permutation", torch.zeros(2, 24, 32).long()])
def test_one_class_is_no_choice(adversarial):
    images = some_images()
    with pytest.raises(ValueError, match=r"at least 2 classes, got \(2, 1, 24, 32\).*binary"):
        DAG()(network(1), images, torch.zeros(2, 24, 32).long(), adversarial)


def test_binary_refuses_what_it_cannot_take():
    with pytest.raises(ValueError, match=r"one logit per target, \(2, 1, \*targets\), got \(2, 4,"):
        victims.binary(network())(some_images())
    with pytest.raises(ValueError, match=r"threshold must lie in \(0, 1\), got 1.5"):
        victims.binary(network(1), 1.5)
    with pytest.raises(TypeError, match="model must be callable"):
        victims.binary(None)
    with pytest.raises(ValueError, match="classes must be two names"):
        victims.binary(network(1), classes=["object"])


# --- probabilities


@pytest.mark.parametrize("kind", ["a softmax", "sigmoids", "one sigmoid", "one above 0.3"])
def test_probabilities_are_noticed_once(kind):
    images, model = some_images(), network(1 if kind.startswith("one") else 4)
    after = (lambda s: s.softmax(1)) if kind == "a softmax" else torch.sigmoid
    wrong = nn.Sequential(model, type("After", (nn.Module,), {"forward": lambda _, s: after(s)})())
    victim = wrong
    if kind.startswith("one"):
        victim = victims.binary(wrong, 0.5 if kind == "one sigmoid" else 0.3)
    with pytest.warns(RuntimeWarning, match=r"all lie in \[0.*as after") as caught:
        DAG(max_iter=3)(victim, images, torch.ones(2, 24, 32).long())
    assert len(caught) == 1


@pytest.mark.parametrize("scale", [1e-3, 1, 100])
def test_scores_are_no_probabilities(scale):
    model = network()
    DAG(max_iter=1)(lambda x: model(x) * scale, some_images(), torch.ones(2, 24, 32).long())


# --- the form of the output


@pytest.mark.parametrize(
    ("shape", "labels"), [((24, 32), (24, 32)), ((32, 32), (32, 32)), ((24, 32), (24 * 32,))]
)
def test_classes_last_are_told(shape, labels):
    model = network()

    def last(x):
        scores = model(x).permute(0, 2, 3, 1)
        return scores.flatten(1, 2) if len(labels) == 1 else scores

    with pytest.raises(ValueError, match=r"got the classes last.*return scores.permute\(0, \d, "):
        DAG()(last, some_images(shape), torch.zeros(2, *labels).long())


def test_the_only_maps_of_a_tuple_are_the_scores():
    images, model = some_images(), network()
    scores = model(images)
    for output in ((scores,), [scores], (scores, scores.mean((2, 3)))):
        assert read_scores(output, images) is scores
    with pytest.raises(TypeError, match=r"got tuple of 2: \(2, 4, 24, 32\), \(2, 4, 24, 32\)"):
        read_scores((scores, scores), images)
    with pytest.raises(TypeError, match=r"got dict of 2: 'masks': \(2, 4, 24, 32\), 'loss': float"):
        read_scores({"masks": scores, "loss": 0.0}, images)


# --- how scores are enlarged


class Aligned(nn.Module):
    """A network whose enlargement aligns corners, at the resolution that it has."""

    align_corners = True

    def __init__(self):
        super().__init__()
        self.inside = network(stride=4)

    def forward(self, images):
        return self.inside(images)


class Tail(nn.Module):
    def forward(self, scores):
        return scores[:, :4].double() / 2


def in_a_function(model):
    return lambda x: {"out": model(x) * 2}


WRAPPED = {
    "prepared": lambda: victims.prepare(Aligned()),
    "prepared, in bf16": lambda: victims.prepare(Aligned(), bf16=True),
    "a sequence": lambda: nn.Sequential(nn.Identity(), victims.prepare(Aligned())),
    "a sequence of the network": lambda: nn.Sequential(nn.Identity(), Aligned()),
    "a function": lambda: in_a_function(victims.prepare(Aligned())),
    "operations": lambda: nn.Sequential(victims.prepare(Aligned()), Tail()),
    "DataParallel": lambda: nn.DataParallel(Aligned()),
    "a victim": lambda: nn.Sequential(victims.Victim(Aligned()), Tail()),
    "compiled": lambda: in_a_function(
        torch.compile(victims.Victim(Aligned()).eval(), backend="aot_eager", fullgraph=True)
    ),
    "a victim in a victim": lambda: victims.Victim(
        nn.Sequential(victims.Victim(Aligned()), Tail())
    ),
}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_a_wrapper_does_not_lose_how_scores_are_enlarged(wrapped):
    images, model = some_images(), WRAPPED[wrapped]()
    labels = labels_of(Aligned(), images, align_corners=True)
    assert int((labels != labels_of(Aligned(), images)).sum()) > 50
    least = 740 if wrapped.endswith("bf16") else 768  # of 24 x 32 targets
    for backend in ("native", "reference"):
        result = DAG(max_iter=1, backend=backend)(model, images, labels)
        assert int(result.active[0].min()) >= least
    scores_of = ScoreModel(model)
    assert type(scores_of(images, labels)) is torch.Tensor
    assert scores_of.align_corners
    adversarial = (labels + 1) % 4
    assert int(DAG().count_active(model, images, labels, adversarial).min()) >= least
    (streamed,) = DAG(max_iter=0).stream(model, [Sample(images[0], labels[0])])
    assert int(streamed.active[0]) >= least


def test_scores_that_were_known_are_enlarged_as_they_say():
    images, model = some_images(count=1), victims.prepare(Aligned())
    labels = labels_of(Aligned(), images, align_corners=True)[0]
    leaf = images.clone().requires_grad_()
    sample = Sample(images[0], labels, known=(leaf, model(leaf)))
    (result,) = DAG(max_iter=0).stream(lambda x: model(x), [sample], slots=1)
    assert int(result.active[0]) == 768


def test_scores_that_align_corners_stay_so():
    images = some_images().requires_grad_()
    scores = victims.prepare(Aligned())(images)
    for same in (scores.half(), scores[:, 1:], scores * 2, torch.cat([scores, scores], 1)):
        assert isinstance(same, AlignedScores)
    gradient, none = torch.autograd.grad(
        scores.sum(), [images, torch.zeros(1, requires_grad=True)], allow_unused=True
    )
    assert type(gradient) is torch.Tensor
    assert float(gradient.abs().max()) > 0
    assert none is None


# --- the network that a prepared one was made of


def off(model, lift):
    """A prepared copy, as if preparing had lost digits: class 0 never wins there."""
    prepared = victims.prepare(model)
    prepared.network.inside[-1].bias.data += torch.tensor([lift, 0, 0, 0])
    return prepared


def wrong_at_the_original(model, images):
    """Labels that all count, of which none is right at the copy, and how many are at the model."""
    labels = labels_of(model, images, align_corners=True)
    labels = torch.where(labels == 0, 255, labels)
    return labels, (labels != 255).sum((1, 2))


def looked(images, left):
    """What a warning says if every image has active targets on the network itself."""
    return (
        rf"^{images} of {images} images that converged .* on the network itself \({left} in all\)"
    )


def test_an_attack_ends_with_a_look_at_the_network_itself():
    images, model = some_images(), Aligned()
    prepared = off(model, 1e3)
    labels, wrong = wrong_at_the_original(model, images)
    with pytest.warns(RuntimeWarning, match=looked(2, int(wrong.sum()))):
        result = DAG()(prepared, images, labels, "runner-up")
    assert set(result.status) == {Status.CONVERGED}
    with pytest.warns(RuntimeWarning, match=r"^1 of 1 images that converged"):
        DAG()(prepared, images[:1], labels[:1])
    DAG(tolerance=0.999)(victims.prepare(model), images, labels)  # says nothing
    again = pickle.loads(pickle.dumps(prepared))
    assert again.original is None
    DAG()(again, images, labels)
    del model
    DAG()(prepared, images, labels)  # nobody has the network any more


def test_a_stream_ends_with_a_look_at_the_network_itself():
    images, model = some_images(), Aligned()
    prepared = off(model, 1e3)
    labels, wrong = wrong_at_the_original(model, images)
    samples = [Sample(*one, key=k) for k, one in enumerate(zip(images, labels, strict=True))]
    with pytest.warns(RuntimeWarning, match=looked(2, int(wrong.sum()))):
        assert len(list(DAG().stream(prepared, samples))) == 2
    list(DAG().stream(model, samples[:1]))  # says nothing


def test_joint_attacks_end_with_a_look_at_the_networks_themselves():
    images, model = some_images(), Aligned()
    prepared = off(model, 1e3)
    labels, wrong = wrong_at_the_original(model, images)
    easy = network(), torch.full_like(labels, 255)
    parts = [dagcore.Part(*easy), dagcore.Part(prepared, labels)]
    said = looked(2, int(wrong.sum()))
    with pytest.warns(RuntimeWarning, match=said):
        dagcore.joint_attack(DAG(), parts, images)
    samples = [
        Sample(image, [own, other])
        for image, own, other in zip(images, easy[1], labels, strict=True)
    ]
    bare = [dagcore.Part(part.model) for part in parts]
    with pytest.warns(RuntimeWarning, match=said):
        list(dagcore.joint_stream(DAG(), bare, samples))


def test_a_universal_perturbation_ends_with_a_look_at_the_network_itself():
    images, model = some_images(), Aligned()
    prepared = off(model, 1e3)
    labels, wrong = wrong_at_the_original(model, images)
    samples = [Sample(*one) for one in zip(images, labels, strict=True)]
    for batch_size in (1, 2):
        with pytest.warns(RuntimeWarning, match=f"leaves {int(wrong.sum())} targets active on the"):
            dagcore.universal_perturbation(DAG(), prepared, samples, batch_size)
    del model
    dagcore.universal_perturbation(DAG(), prepared, samples)  # nobody has the network any more


def test_attacks_on_a_prepared_detector_end_with_a_look_at_the_detector_itself():
    def logits(x):
        found = F.avg_pool2d(x, 4).flatten(2)
        return torch.tensor([[2.0, 2.0, 9.0, 9.0]]).expand(len(x), found.shape[2], 4), found

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.lift = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            boxes, found = logits(x)
            return boxes, found + self.lift[:, None]

    victim, images = victims.dense_detector(Head(), threshold=0.3), some_images((16, 16), 1)
    targets = victim.dense_targets(images)
    prepared = victims.prepare(victim)
    for parameter in prepared.parameters():
        parameter.data -= 1e3  # the copy sees nothing
    aims = targets.labels, targets.adversarial_labels
    right = int(DAG().count_active(victim, images, *aims))
    assert right > 0
    with pytest.warns(RuntimeWarning, match=looked(1, right)):
        DAG()(prepared, images, *aims)
    assert copy.deepcopy(prepared).original is None


# --- networks of one size


class OneSize(nn.Module):
    """Takes 16 x 24 pixels only."""

    def __init__(self, stride):
        super().__init__()
        self.inside = network(stride=stride)

    def forward(self, images):
        if images.shape[2:] != (16, 24):
            raise RuntimeError("needs 16 x 24 pixels")
        return {"out": self.inside(images)}


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("size", [(16, 24), (40, 24), (8, 48), (12, 20)])
def test_images_are_resized_to_the_networks_size(size, stride):
    victim = victims.Victim(OneSize(stride), size=(16, 24), mean=[0.5] * 3).eval()
    images = some_images(size)
    resized = F.interpolate(images, (16, 24), mode="bilinear", antialias=True)
    maps = victim.network.inside(resized - 0.5)
    fits = maps.shape[2] <= size[0] and maps.shape[3] <= size[1]
    expected = maps if fits else F.interpolate(maps, size, mode="bilinear")
    scores = read_scores(victim(images), images)
    torch.testing.assert_close(scores, expected)
    labels = labels_of(victim, images)
    result = DAG(max_iter=2)(victim, images, labels)
    assert result.adversarial.shape == images.shape
    assert result.active[0].tolist() == [size[0] * size[1]] * 2
    assert float(result.perturbation.abs().max()) > 0
    prepared = victims.prepare(victim)
    torch.testing.assert_close(prepared(images), scores, rtol=1e-4, atol=1e-4)


def test_bad_sizes():
    with pytest.raises(TypeError, match=r"size must be \(height, width\), got 16"):
        victims.Victim(network(), size=16)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        victims.Victim(network(), size=(0, 16))
    with pytest.raises(ValueError, match="'FR-ZF-07', a detector that resizes images itself"):
        victims.load("FR-ZF-07", size=(16, 24))
