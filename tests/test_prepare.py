"""`victims.prepare`: a faster copy with the network's own scores and gradients."""

import copy
import pickle
import shutil

import pytest
import torch
from support import shaken, smp_network, torchvision_network, transformers_network
from torch import nn
from torch.nn import functional as F

import dagcore
from dagcore import victims, zoo
from dagcore.engine import read_scores

NETWORKS = {
    "deeplabv3_mobilenet_v3_large": (torchvision_network, 53),
    "fcn_resnet50": (torchvision_network, 54),
    "lraspp_mobilenet_v3_large": (torchvision_network, 47),
    "FPN": (smp_network, 20),
    "DeepLabV3Plus": (smp_network, 29),
    "Segformer": (transformers_network, 1),
    "MobileNetV2": (transformers_network, 55),
    "Data2VecVision": (transformers_network, 14),
    "demo": (lambda _: victims.load("demo"), 49),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def images():
    return torch.rand(1, 3, 64, 64)


def tiny():
    return shaken(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1)
        )
    )


def relative(a, b):
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm())


def scores_of(model, images, shape):
    """The scores, enlarged to a shape where they do not have it."""
    scores = read_scores(model(images), images)
    if scores.shape == shape:
        return scores
    align = model.align_corners
    return F.interpolate(scores, size=shape[2:], mode="bilinear", align_corners=align)


def scores_and_gradient(model, images, seed):
    """Scores enlarged to the seed's size, and the gradient of <scores, seed> at the images."""
    x = images.clone().requires_grad_()
    scores = scores_of(model, x, seed.shape)
    (gradient,) = torch.autograd.grad((scores * seed).sum(), x)
    return scores.detach(), gradient


@pytest.mark.parametrize("name", NETWORKS)
def test_scores_are_the_networks_own(name, images):
    make, folded = NETWORKS[name]
    network = make(name)
    prepared = victims.prepare(network)
    assert prepared.preparation.low_resolution is (name != "demo")
    assert prepared.preparation.folded == folded
    assert prepared.preparation.merged == (name == "Segformer")
    assert all(why == "it does not run" for why in prepared.preparation.left.values())
    with torch.no_grad():
        expected = read_scores(network(images), images)
        assert relative(scores_of(prepared, images, expected.shape), expected) < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_scores_and_gradients_differ_by_nothing_but_rounding(name, images):
    # In float32 a rounding moves some unit across the kink of its ReLU, and the gradient jumps.
    network = NETWORKS[name][0](name).double()
    images = images.double()
    with torch.no_grad():
        seed = torch.randn_like(read_scores(network(images), images))
    prepared = victims.prepare(network)
    assert prepared.preparation.folded == NETWORKS[name][1]
    scores, gradient = scores_and_gradient(prepared, images, seed)
    own_scores, own_gradient = scores_and_gradient(network, images, seed)
    assert scores.dtype == gradient.dtype == torch.float64
    assert relative(scores, own_scores) < 1e-9
    assert relative(gradient, own_gradient) < 1e-7


def test_the_network_itself_is_never_changed(images):
    network = torchvision_network("fcn_resnet50").train()
    network.backbone.bn1.eval()
    network.classifier[4].bias.requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    modules = list(network.modules())
    modes = [(module.training, type(module)) for module in modules]
    learning = [p.requires_grad for p in network.parameters()]
    strides = [p.stride() for p in network.parameters()]
    prepared = victims.prepare(network, bf16=True)
    prepared(images)
    after = network.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert list(network.modules()) == modules
    assert [(module.training, type(module)) for module in modules] == modes
    assert [p.requires_grad for p in network.parameters()] == learning
    assert [p.stride() for p in network.parameters()] == strides
    assert not {id(p) for p in prepared.parameters()} & {id(p) for p in network.parameters()}


def test_it_stays_in_eval_mode_without_gradients(images):
    prepared = victims.prepare(tiny().train())
    prepared.train()
    assert not any(module.training for module in prepared.modules())
    assert not any(p.requires_grad for p in prepared.parameters())
    assert torch.equal(prepared(images), prepared(images))


@pytest.mark.parametrize("name", ["deeplabv3_mobilenet_v3_large", "Segformer"])
def test_bf16_is_close(name, images):
    network = NETWORKS[name][0](name)
    with torch.no_grad():
        seed = torch.randn_like(read_scores(network(images), images))
    prepared = victims.prepare(network, bf16=True)
    scores, gradient = scores_and_gradient(prepared, images, seed)
    own_scores, own_gradient = scores_and_gradient(network, images, seed)
    assert scores.dtype == gradient.dtype == torch.float32
    assert 1e-5 < relative(scores, own_scores) < 0.03
    assert F.cosine_similarity(gradient.flatten(), own_gradient.flatten(), dim=0) > 0.7
    doubled = prepared(images.double())
    assert doubled.dtype == torch.float64


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled(images):
    network = tiny()
    prepared = victims.prepare(network, compile=True)
    seed = torch.randn(1, 5, 64, 64)
    scores, gradient = scores_and_gradient(prepared, images, seed)
    own_scores, own_gradient = scores_and_gradient(network, images, seed)
    assert relative(scores, own_scores) < 1e-5
    assert relative(gradient, own_gradient) < 1e-4


def test_an_attack_takes_the_victim(images):
    network = torchvision_network("lraspp_mobilenet_v3_large")
    with torch.no_grad():
        labels = network(images)["out"].argmax(1)
    attack = dagcore.DAG(max_iter=8, gamma=1 / 255)
    prepared, own = (
        attack(victim, images, labels, (labels + 1) % 5)
        for victim in (victims.prepare(network), network)
    )
    assert prepared.active[-1] < 0.97 * prepared.active[0]
    torch.testing.assert_close(prepared.active, own.active, rtol=0.01, atol=20)


class Branches(nn.Module):
    """Batch norms that must stay, each for a reason of its own; one that may go."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.shared = nn.Conv2d(4, 4, 1)
        self.shared_norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        self.read_twice = nn.Conv2d(4, 4, 1)
        self.read_twice_norm = nn.BatchNorm2d(4)
        self.activated = nn.Conv2d(4, 4, 1)
        self.activated_norm = nn.BatchNorm2d(4)
        self.standardised = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
        self.standardised_norm = nn.BatchNorm2d(4)
        self.grouped = nn.ConvTranspose2d(4, 4, 2, groups=2)
        self.grouped_norm = nn.BatchNorm2d(4)
        self.twice_norm = nn.BatchNorm2d(4)
        self.batch_statistics = nn.BatchNorm2d(4, track_running_stats=False)
        self.idle_norm = nn.BatchNorm2d(4)

    def forward(self, images):
        x = self.norm(self.plain(images))
        first, second = self.shared_norms
        x = first(self.shared(x)) + second(self.shared(x.relu()))
        y = self.read_twice(x)
        x = self.read_twice_norm(y) + y[:, :, :1]
        x = self.activated_norm(F.relu(self.activated(x), inplace=True))
        x = self.standardised_norm(self.standardised(x))
        x = self.grouped_norm(self.grouped(x))
        x = self.twice_norm(self.twice_norm(x))
        return self.batch_statistics(x)


def test_what_cannot_be_folded_stays_and_says_why(images):
    network = shaken_where_possible(Branches())
    prepared = victims.prepare(network, channels_last=False)
    assert prepared.preparation.folded == 1
    reasons = {
        "shared_norms.0": "used more than once",
        "shared_norms.1": "used more than once",
        "read_twice_norm": "something else reads",
        "activated_norm": "no convolution comes before it",
        "standardised_norm": "not a module's own parameter",
        "grouped_norm": "transposed and grouped",
        "twice_norm": "runs 2 times",
        "batch_statistics": "statistics of the batch",
        "idle_norm": "does not run",
    }
    assert prepared.preparation.left.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in prepared.preparation.left[name]
    assert "folded=1" in repr(prepared)
    torch.testing.assert_close(prepared(images), network(images), rtol=1e-4, atol=1e-5)


def shaken_where_possible(network):
    network.batch_statistics.running_mean = torch.zeros(4)
    network.batch_statistics.running_var = torch.ones(4)
    shaken(network)
    network.batch_statistics.running_mean = network.batch_statistics.running_var = None
    return network


class Odd(nn.Module):
    """A transposed convolution; a norm without weights in a plain list; scores from a conv."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 6, 2, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(6, affine=False)
        self.also = [self.norm]
        self.head = nn.Conv2d(6, 5, 1)

    def forward(self, images):
        return self.head(self.also[0](self.up(images)))


def test_transposed_convolutions_and_norms_held_in_lists(images):
    network = Odd()
    nn.init.uniform_(network.norm.running_mean, -1, 1)
    nn.init.uniform_(network.norm.running_var, 0.5, 2)
    prepared = victims.prepare(network.eval())
    assert prepared.preparation.folded == 1
    assert not any(isinstance(m, nn.BatchNorm2d) for m in prepared.modules())
    torch.testing.assert_close(prepared(images), network(images), rtol=1e-5, atol=1e-6)


def test_frozen_batch_norms_are_folded(images):
    ops = pytest.importorskip("torchvision").ops
    frozen = ops.FrozenBatchNorm2d(4, eps=1e-3)
    for name, buffer in frozen.named_buffers():
        nn.init.uniform_(buffer, 0.5 if name in ("running_var", "weight") else -1, 2)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), frozen, nn.ReLU(), nn.Conv2d(4, 5, 1)).eval()
    prepared = victims.prepare(network)
    assert prepared.preparation.folded == 1
    assert network[1] is frozen
    torch.testing.assert_close(prepared(images), network(images), rtol=1e-5, atol=1e-5)


def jolted(network):
    """What training does to weights and statistics, in place."""
    with torch.no_grad():
        for value in (*network.parameters(), *network.buffers()):
            if value.is_floating_point():
                value.mul_(torch.empty_like(value).uniform_(0.9, 1.1))
    return network


REFRESHED = [
    *((name, {}) for name in NETWORKS if name != "fcn_resnet50"),  # the largest, and like others
    ("deeplabv3_mobilenet_v3_large", {"bf16": True}),
    ("Segformer", {"bf16": True}),
    ("lraspp_mobilenet_v3_large", {"fold_batch_norm": False}),
    ("demo", {"fold_batch_norm": False, "bf16": True}),
]


@pytest.mark.parametrize(("name", "options"), REFRESHED, ids=str)
def test_refreshed_is_prepared_anew(name, options, images):
    network = NETWORKS[name][0](name)
    options = {"merge_linear": False, **options}
    prepared = victims.prepare(network, **options)
    before = prepared(images)
    jolted(network)
    assert torch.equal(prepared(images), before)
    victims.refresh(prepared)
    anew = victims.prepare(network, **options)
    assert not torch.equal(prepared(images), before)
    assert torch.equal(prepared(images), anew(images))
    assert not any(parameter.requires_grad for parameter in prepared.parameters())


def test_refreshed_frozen_norms_and_detectors(images):
    ops = pytest.importorskip("torchvision").ops
    network = nn.Sequential(nn.Conv2d(3, 4, 3), ops.FrozenBatchNorm2d(4), nn.Conv2d(4, 5, 1)).eval()
    detector = victims.detector(zoo.build("FR-VGG-07", num_classes=5, width=1 / 32, norm=True))
    boxes = torch.tensor([[[3.0, 4.0, 50.0, 60.0]]])
    for one, given in ((network, (images,)), (detector.eval(), (images, boxes))):
        # The wrapper around a detector may be gone: its network is what is followed.
        prepared = victims.prepare(victims.detector(one.network) if one is detector else one)
        assert prepared.preparation.folded > 0
        jolted(one)
        victims.refresh(prepared)
        assert torch.equal(prepared(*given), victims.prepare(one)(*given))
        torch.testing.assert_close(prepared(*given), one(*given), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_refreshed():
    network = tiny()
    prepared = victims.prepare(network)
    with pytest.raises(TypeError, match=r"prepared must be a result of .*prepare, got Sequential"):
        victims.refresh(network)
    with pytest.raises(ValueError, match="prepared must be a copy of a network that still exists"):
        victims.refresh(pickle.loads(pickle.dumps(prepared)))
    network.append(nn.ReLU())
    with pytest.raises(ValueError, match="which has others now: call prepare again"):
        victims.refresh(prepared)
    network = transformers_network("Segformer")
    with pytest.raises(ValueError, match="got a merged decode head"):
        victims.refresh(victims.prepare(network))


def test_norms_of_timm_keep_their_activation(images):
    layers = pytest.importorskip("timm").layers
    network = shaken(
        nn.Sequential(nn.Conv2d(3, 4, 3), layers.BatchNormAct2d(4), nn.Conv2d(4, 5, 1))
    )
    prepared = victims.prepare(network)
    assert prepared.preparation.folded == 1
    torch.testing.assert_close(prepared(images), network(images), rtol=1e-5, atol=1e-6)


class ForgetsItsBias(nn.Conv2d):
    def forward(self, images):
        return F.conv2d(images, self.weight)


def test_a_convolution_that_is_not_what_it_seems_is_noticed():
    network = shaken(nn.Sequential(ForgetsItsBias(3, 4, 1, bias=False), nn.BatchNorm2d(4)))
    with pytest.raises(RuntimeError, match="must not change the scores, they differ by"):
        victims.prepare(network)
    assert victims.prepare(network, fold_batch_norm=False).preparation.folded == 0


def test_the_example_is_for_networks_that_take_no_other_size():
    class Fussy(nn.Sequential):
        def forward(self, images):
            if images.shape[-1] != 40:
                raise RuntimeError("images must be 40 wide")
            return super().forward(images)

    network = shaken(Fussy(*tiny()))
    with pytest.raises(ValueError, match=r"\(1, 3, 224, 224\) fails: .*40 wide.*give example"):
        victims.prepare(network)
    prepared = victims.prepare(network, example=torch.rand(1, 3, 40, 40))
    assert prepared.preparation.folded == 1


def test_low_resolution_where_it_is_understood():
    fcn = torchvision_network("fcn_resnet50")
    images = torch.rand(1, 3, 64, 64)
    assert victims.prepare(fcn, fold_batch_norm=False)(images).shape == (1, 5, 8, 8)
    whole = victims.prepare(fcn, low_resolution=False, fold_batch_norm=False)
    assert whole(images).shape == (1, 5, 64, 64)
    assert whole.preparation.low_resolution is False
    assert victims.prepare(smp_network("FPN")).align_corners is True
    assert victims.prepare(tiny()).preparation.low_resolution is False
    with pytest.raises(TypeError, match="must be a segmentation network of torchvision, "):
        victims.prepare(tiny(), low_resolution=True)
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got function"):
        victims.prepare(lambda x: x)


def test_names_for_figures_are_kept():
    victim = victims.Victim(tiny(), classes=list("abcde"), palette=[(0, 0, 0)] * 5)
    prepared = victims.prepare(victim)
    assert prepared.classes == victim.classes
    assert prepared.palette == victim.palette


def test_channels_last_where_convolutions_dominate():
    convolutions = victims.prepare(tiny())
    weight = next(convolutions.parameters())
    assert convolutions.preparation.channels_last is True
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert victims.prepare(tiny(), channels_last=False).preparation.channels_last is False
    transformers = pytest.importorskip("transformers")
    segformer = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig())
    whole = victims.prepare(segformer, merge_linear=False)
    assert whole.preparation.channels_last is False
    assert victims.prepare(segformer).preparation.channels_last is True


def test_merging_segformers_linear_layers_is_an_option(images):
    network = transformers_network("Segformer")
    merged = victims.prepare(network)
    whole = victims.prepare(network, merge_linear=False)
    assert merged.preparation.merged == 1
    assert whole.preparation.merged == 0
    torch.testing.assert_close(merged(images), whole(images), rtol=1e-4, atol=1e-5)
    unfolded = victims.prepare(network, fold_batch_norm=False)
    assert unfolded.preparation.folded == 0
    torch.testing.assert_close(unfolded(images), whole(images), rtol=1e-4, atol=1e-5)
