"""Victims by name: what they compute, and how they fail."""

import sys
import urllib.error

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import segmentation

from dagcore import victims

NAME = "lraspp_mobilenet_v3_large"


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=4
    ).eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def normalised(images):
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return (images - mean) / std


@pytest.mark.parametrize("form", ["plain", "model", "state_dict", "parallel", "safetensors"])
def test_weights_files_are_understood(tmp_path, network, images, form):
    path, state = tmp_path / "weights.pth", network.state_dict()
    if form == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    elif form == "parallel":
        torch.save({f"module.{key}": value for key, value in state.items()}, path)
    else:
        torch.save(state if form == "plain" else {form: state, "epoch": 3}, path)
    victim = victims.load(NAME, path)
    assert not victim.training
    assert victim.classes is None  # torchvision's names are those of 21 classes
    with torch.no_grad():
        torch.testing.assert_close(
            victim(images)["out"], network(normalised(images))["out"], rtol=0, atol=0
        )


def test_class_names_and_auxiliary_classifier(tmp_path):
    other = segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True)
    torch.save(other.state_dict(), tmp_path / "fcn.pth")
    victim = victims.load("FCN-ResNet50", tmp_path / "fcn.pth")  # torchvision's fcn_resnet50
    assert victim.classes[15] == "person"
    assert victim.network.aux_classifier is None


def test_weights_that_do_not_fit(tmp_path, network):
    path = tmp_path / "weights.pth"
    state = network.state_dict()
    first = next(iter(state))
    torch.save({**state, "more": torch.zeros(1), first: torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=rf"1 unexpected \(more, .*1 of another shape \({first}"):
        victims.load(NAME, path)
    del state[first]
    torch.save(state, path)
    with pytest.raises(ValueError, match=rf"1 missing \({first}"):
        victims.load(NAME, path)
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="has no classifier"):
        victims.load(NAME, path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="must hold a state dict"):
        victims.load(NAME, path)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_weights_that_cannot_be_read(tmp_path, ending):
    path = tmp_path / f"weights.{ending}"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        victims.load(NAME, path)
    for content in (b"", b"some words"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as a state dict"):
            victims.load(NAME, path)


def test_code_in_a_weights_file_is_not_run(tmp_path):
    torch.save({"a": sys.exit}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="cannot be read as a state dict"):
        victims.load(NAME, tmp_path / "weights.pth")


def test_a_download_that_fails_asks_for_a_file(monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(OSError, match=r"no network.*--weights FILE"):
        victims.load(NAME)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"DL-VGG.*fcn_resnet50.*got 'vgg16'"):
        victims.load("vgg16")
    with pytest.raises(ValueError, match=r"got 'fcn-resnet5'; did you mean fcn_resnet50\?"):
        victims.load("fcn-resnet5")
    with pytest.raises(ValueError, match="weights must not be given"):
        victims.load("Demo", "weights.pth")


def test_demo_network_is_the_classifier_at_every_cell(capsys):
    victim = victims.load("demo")
    assert capsys.readouterr().out == ""
    network = victim.network.network
    images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scores = victim(images)
        whole = network((255 * images - 127) / 128)
    assert scores.shape == (1, 1000, 2, 3)
    # The classifier is linear: its scores of the mean feature are the mean of its scores.
    torch.testing.assert_close(scores.mean((2, 3)), whole, rtol=1e-4, atol=1e-4)
    assert len(victim.classes) == 1000
    assert victim.classes[949] == "strawberry"


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match=r'pip install "dagcore\[demo\]"'):
        victims.load("demo")


def test_a_function_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "own_victim.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    classes = ['a', 'b']\n"
        "    palette = [(0, 0, 0), (255, 0, 0)]\n"
        "    def forward(self, x):\n"
        "        return x[:, :2] * 3\n"
        "plain = lambda: (lambda x: x)\n"
        "ready = Net\n"
    )
    (tmp_path / "broken_victim.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    images = torch.rand(1, 3, 4, 4)
    victim = victims.load("own_victim:ready")
    assert victim.classes == ("a", "b")
    assert victim.palette == ((0, 0, 0), (255, 0, 0))
    assert torch.equal(victim(images), images[:, :2] * 3)
    assert torch.equal(victims.load("own_victim:plain")(images), images)
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        victims.load("broken_victim:make")
