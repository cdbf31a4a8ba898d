"""`victims.low_resolution`: scores before the last enlargement, enlarged, are the network's own."""

import pytest
import torch
from support import SMP, smp_network, torchvision_network, transformers_network
from torch import nn
from torch.nn import functional as F

from dagcore import victims

TORCHVISION = {  # and the size of the scores of a 64x96 image
    "fcn_resnet50": (8, 12),
    "deeplabv3_resnet50": (8, 12),
    "deeplabv3_mobilenet_v3_large": (4, 6),
    "lraspp_mobilenet_v3_large": (8, 12),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def images():
    return torch.rand(2, 3, 64, 96)


def enlarged(victim, images, size):
    with torch.no_grad():
        scores = victim(images)
    return F.interpolate(scores, size=size, mode="bilinear", align_corners=victim.align_corners)


def own(network, images):
    with torch.no_grad():
        output = network(images)
    if isinstance(output, dict) and "out" in output:
        return output["out"]
    if isinstance(output, tuple):
        return output[0]
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize("aux", [None, True])
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name, aux, images):
    if aux and name.startswith("lraspp"):
        pytest.skip("LR-ASPP has no auxiliary classifier")
    network = torchvision_network(name, **({"aux_loss": True} if aux else {}))
    victim = victims.low_resolution(network)
    assert victim(images).shape == (2, 5, *TORCHVISION[name])
    assert torch.equal(enlarged(victim, images, (64, 96)), own(network, images))


@pytest.mark.parametrize("name", SMP)
def test_segmentation_models_pytorch(name):
    images = torch.rand(1, 3, 128, 160)
    network = smp_network(name)
    victim = victims.low_resolution(network)
    scores = own(network, images)
    enlarges = name not in ("Unet", "Unet with a classifier", "Linknet")
    assert victim.align_corners is enlarges
    assert (victim(images).shape != scores.shape) is enlarges
    torch.testing.assert_close(enlarged(victim, images, (128, 160)), scores, rtol=1e-6, atol=1e-6)


def test_the_other_reading_is_another(images):
    network = smp_network("FPN")
    victim = victims.low_resolution(network)
    victim.align_corners = False
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            enlarged(victim, images, (64, 96)), own(network, images), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("name", ["sigmoid", "softmax2d"])
def test_scores_after_an_activation_are_refused(name):
    with pytest.raises(ValueError, match=r"activation=None.*got activation (Sigmoid|Softmax)"):
        victims.low_resolution(smp_network("FPN", activation=name))


def test_a_head_of_the_users_own_is_refused():
    network = smp_network("FPN")
    network.segmentation_head[1] = nn.Upsample(scale_factor=4, mode="nearest")
    with pytest.raises(TypeError, match=r"enlarge bilinearly or not at all, got Upsample"):
        victims.low_resolution(network)
    network.segmentation_head = nn.Conv2d(128, 5, 1)
    with pytest.raises(TypeError, match=r"convolution, upsampling and activation, got Conv2d"):
        victims.low_resolution(network)


@pytest.mark.parametrize(
    "name",
    ["Segformer", "DPT", "Beit", "Data2VecVision", "MobileViT", "MobileViTV2", "MobileNetV2"],
)
def test_transformers_logits_are_handed_on(name):
    network = transformers_network(name)
    images = torch.rand(2, 3, 64, 64)
    victim = victims.low_resolution(network)
    with torch.no_grad():
        assert torch.equal(victim(images), own(network, images))
    assert victim.align_corners is False


def test_transformers_upernet(images):
    network = transformers_network("UperNet")
    victim = victims.low_resolution(network)
    assert victim(images).shape == (2, 5, 16, 24)
    assert torch.equal(enlarged(victim, images, (64, 96)), own(network, images))


def test_gradients_are_the_networks_own(images):
    network = torchvision_network("lraspp_mobilenet_v3_large")
    gradients = []
    for model in (network, victims.low_resolution(network)):
        x = images.clone().requires_grad_()
        output = model(x)
        if isinstance(output, dict):
            scores = output["out"]
        else:
            scores = F.interpolate(output, size=(64, 96), mode="bilinear", align_corners=False)
        gradients += torch.autograd.grad(scores[:, 1].sum(), x)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_the_network_is_shared_and_left_as_it_is(images):
    network = torchvision_network("fcn_resnet50").train()
    network.classifier.eval()
    modes = [module.training for module in network.modules()]
    victim = victims.low_resolution(network)
    assert [module.training for module in network.modules()] == modes
    assert victim.training
    assert {id(p) for p in victim.parameters()} == {id(p) for p in network.parameters()}
    victim.eval()
    assert not any(module.training for module in network.modules())
    with torch.no_grad():
        network.classifier[4].weight.zero_()
        network.classifier[4].bias.fill_(3)
        assert torch.equal(victim(images), torch.full((2, 5, 8, 12), 3.0))


def test_inside_a_victim_or_a_sequence(images):
    network = smp_network("FPN")
    victim = victims.Victim(network, mean=[0.4] * 3, std=[0.2] * 3, classes=list("abcde"))
    low = victims.low_resolution(victim.eval())
    assert low.classes == tuple("abcde")
    assert low.align_corners
    assert not low.training
    expected = own(victim, images)
    torch.testing.assert_close(enlarged(low, images, (64, 96)), expected, rtol=1e-6, atol=1e-6)
    sequence = victims.low_resolution(nn.Sequential(nn.InstanceNorm2d(3), network))
    assert sequence.align_corners
    expected = own(network, nn.InstanceNorm2d(3)(images))
    torch.testing.assert_close(enlarged(sequence, images, (64, 96)), expected, rtol=1e-6, atol=1e-6)
    assert victims.low_resolution(low.network) is low.network


def test_what_is_not_understood_says_what_is():
    models = pytest.importorskip("torchvision").models

    class Own(models.segmentation.FCN):
        def forward(self, images):
            return super().forward(1 - images)

    fcn = torchvision_network("fcn_resnet50")
    unknown = [
        nn.Conv2d(3, 5, 1),
        nn.Sequential(),
        nn.Sequential(fcn, nn.Softmax(1)),
        victims.Victim(lambda x: x),
        Own(fcn.backbone, fcn.classifier),
    ]
    for network in unknown:
        with pytest.raises(TypeError, match=r"must be a segmentation network of .* got "):
            victims.low_resolution(network)


def test_hooks_and_replaced_forwards_are_not_gone_past():
    hooked = torchvision_network("lraspp_mobilenet_v3_large")
    handle = hooked.register_forward_hook(lambda module, args, output: output)
    with pytest.raises(TypeError, match="no forward hooks"):
        victims.low_resolution(hooked)
    handle.remove()
    assert victims.low_resolution(hooked) is not None
    hooked.forward = lambda x: x
    with pytest.raises(TypeError, match="its class's own forward"):
        victims.low_resolution(hooked)
