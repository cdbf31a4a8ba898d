"""The zoo: the paper's networks at any width, what they compute, and their weights files."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dagcore import victims, zoo
from dagcore.zoo import detection, registry

SEGMENTATION = {"FCN-Alex": 16, "FCN-VGG": 8, "DL-VGG": 8, "DL-RN101": 8}  # and their strides
DETECTION = ("FR-ZF-07", "FR-VGG-07", "R-FCN-RN50", "R-FCN-RN101")
PLAIN = ("FCN-Alex", "FCN-VGG", "DL-VGG", "FR-ZF-07", "FR-VGG-07")
SMALL = {"num_classes": 5, "width": 1 / 16}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def warmed(name, **options):
    """A network with batch norms whose statistics are those of images it has seen."""
    network = zoo.build(name, **{**SMALL, "norm": True, **options})
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.momentum = 1.0
    images = torch.rand(4, 3, 128, 160)
    with torch.no_grad():
        network(images) if name in SEGMENTATION else network.backbone(4 * images - 2)
    return network.eval()


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def on_meta(name, **options):
    with torch.device("meta"):
        return zoo.build(name, **options)


def test_the_papers_twelve_stand_in_the_order_of_its_tables():
    names = "FCN-Alex FCN-Alex* FCN-VGG FCN-VGG* DL-VGG DL-RN101"
    names += " FR-ZF-07 FR-ZF-0712 FR-VGG-07 FR-VGG-0712 R-FCN-RN50 R-FCN-RN101"
    assert [entry.name for entry in zoo.ENTRIES] == [*names.split(), "FCOS-VGG"]
    assert [entry.task for entry in zoo.ENTRIES] == ["segmentation"] * 6 + ["detection"] * 7
    assert len({entry.slug for entry in zoo.ENTRIES}) == 13
    assert zoo.find("FCN-VGG*").path.name == "fcn-vgg-star.safetensors"
    with pytest.raises(dataclasses.FrozenInstanceError):
        zoo.ENTRIES[0].width = 1


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("dl-vgg", "DL-VGG"),
        ("DL_VGG", "DL-VGG"),
        ("fcn-vgg-star", "FCN-VGG*"),
        ("fcn_vgg*", "FCN-VGG*"),
        ("FCN-VGG", "FCN-VGG"),
        ("rfcn_rn50", "R-FCN-RN50"),
    ],
)
def test_names_in_any_spelling(given, name):
    assert zoo.find(given) is zoo.find(name)
    built, same = on_meta(given), on_meta(name)
    assert parameters(built) == parameters(same)
    if zoo.find(name).path.is_file():
        found, expected = victims.load(given), victims.load(name)
        assert type(found) is type(expected)
        state = expected.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in found.state_dict().items())
        assert zoo.load(given).classes == expected.classes


def test_width_1_is_the_papers_size():
    table = re.findall(r"^    ([\w-]+) +([\d.]+) +~?([\d.]+)$", registry.__doc__, re.MULTILINE)
    built = {entry.architecture: parameters(on_meta(entry.name, width=1)) for entry in zoo.ENTRIES}
    beside = built.pop("fcos-vgg")
    assert f"fcos-vgg, which is not in the paper, has {beside / 1e6:.1f}." in registry.__doc__
    assert {name: float(stated) for name, stated, _ in table} == {
        name: round(count / 1e6, 1) for name, count in built.items()
    }
    for name, _, published in table:
        assert built[name] / 1e6 == pytest.approx(float(published), rel=0.015)


def test_the_shipped_sizes_fit_into_40_megabytes():
    sizes = [parameters(on_meta(entry.name)) for entry in zoo.ENTRIES]
    assert max(sizes) < 2e6
    assert 2 * sum(sizes) < 32e6  # of float16
    assert sum(file.stat().st_size for file in registry.WEIGHTS.glob("*.safetensors")) <= 40e6


@pytest.mark.parametrize(("name", "stride"), SEGMENTATION.items())
@pytest.mark.parametrize("size", [(128, 160), (97, 131), (40, 33)])
def test_scores_at_the_networks_stride(name, stride, size):
    network = zoo.build(name, **SMALL).eval()
    images = torch.rand(2, 3, *size, requires_grad=True)
    scores = network(images)
    assert scores.shape == (2, 5, *(math.ceil(side / stride) for side in size))
    scores.square().sum().backward()
    assert images.grad.isfinite().all()
    assert images.grad.abs().amax((1, 2, 3)).min() > 0


def test_fcn_alex_has_stride_32_of_what_it_enlarges():
    images = torch.rand(1, 3, 128, 160)
    assert zoo.build("FCN-Alex", **SMALL, enlarge=1).eval()(images).shape == (1, 5, 4, 5)
    assert not any(isinstance(m, nn.Upsample) for m in on_meta("FCN-Alex", width=1).modules())


def test_victims_of_the_zoo_take_images_from_0_to_1():
    victim = zoo.build("FCN-Alex", **SMALL).eval()
    assert isinstance(victim, victims.Victim)
    assert not victim.align_corners
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(victim(images), victim.network((images - 0.5) / 0.25))


@pytest.mark.parametrize("name", PLAIN)
def test_folding_changes_scores_by_rounding_only(name):
    trained = warmed(name)
    folded = zoo.fold(trained)
    assert any(isinstance(module, nn.BatchNorm2d) for module in trained.modules())
    plain = zoo.build(name, **SMALL).eval()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    plain.load_state_dict(folded.state_dict(), strict=True)
    images = torch.rand(2, 3, 96, 131)
    read = (lambda net: net(images)) if name in SEGMENTATION else lambda net: net.backbone(images)
    with torch.no_grad():
        expected, found = read(trained), read(plain)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


def test_folding_leaves_residual_networks_as_they_are():
    network = warmed("DL-RN101").train()
    folded = zoo.fold(network)
    assert network.training
    assert not folded.training
    assert folded.state_dict().keys() == network.state_dict().keys()


def test_untrained_bottlenecks_are_their_shortcuts():
    stage = zoo.build("DL-RN101", **SMALL).network.backbone.layer3
    features = torch.rand(2, stage[0].conv1.in_channels, 8, 8)
    torch.testing.assert_close(stage(features), stage[0](features))


def test_dilation_keeps_the_view_of_the_strides_it_replaces():
    large_fov = zoo.build("DL-VGG", **SMALL).network
    assert [large_fov.get_submodule(f"conv5_{k}").dilation[0] for k in (1, 2, 3)] == [2, 2, 2]
    assert large_fov.fc6.dilation == (12, 12)
    backbone = zoo.build("DL-RN101", **SMALL).network.backbone
    assert [len(backbone.get_submodule(f"layer{k}")) for k in (1, 2, 3, 4)] == [3, 4, 23, 3]
    assert {block.conv2.dilation[0] for block in backbone.layer3} == {2}
    assert {block.conv2.dilation[0] for block in backbone.layer4} == {4}


def test_skips_add_finer_scores():
    network = warmed("FCN-VGG").network
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for layer in (network.score_pool4, network.score_pool3):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        coarse = network.score_fr(network.features(images))
        for scale in (2, 2):
            coarse = nn.functional.interpolate(coarse, scale_factor=scale, mode="bilinear")
        torch.testing.assert_close(network(images), coarse)
        nn.init.ones_(network.score_pool3.bias)
        torch.testing.assert_close(network(images), coarse + 1)


def some_targets():
    return [
        {
            "boxes": torch.tensor([[10.0, 20.0, 60.0, 90.0], [80.0, 30.0, 140.0, 100.0]]),
            "labels": torch.tensor([1, 4]),
        },
        {"boxes": torch.tensor([[30.0, 5.0, 90.0, 60.0]]), "labels": torch.tensor([2])},
    ]


@pytest.mark.parametrize("name", DETECTION)
def test_detectors_train(name):
    network = zoo.build(name, **SMALL, norm=True)
    images = [torch.rand(3, 128, 160, requires_grad=True), torch.rand(3, 100, 131)]
    losses = network(images, some_targets())
    assert set(losses) == {
        "loss_classifier",
        "loss_box_reg",
        "loss_objectness",
        "loss_rpn_box_reg",
    }
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert images[0].grad.abs().max() > 0
    last = {"R": "roi_heads.box_roi_pool.rfcn_bbox", "F": "roi_heads.box_predictor.bbox_pred"}
    first = next(iter(network.backbone.state_dict()))
    for weight in (f"{last[name[0]]}.weight", "rpn.head.conv.0.0.weight", f"backbone.{first}"):
        gradient = network.get_parameter(weight).grad
        assert gradient.isfinite().all(), weight
        assert gradient.abs().max() > 0, weight


@pytest.mark.parametrize("name", DETECTION)
def test_detectors_detect(name):
    network = zoo.build(name, **SMALL, box_score_thresh=0.0).eval()
    images = [torch.rand(3, 128, 160, requires_grad=True), torch.rand(3, 100, 131)]
    detections = network(images)
    for image, found in zip(images, detections, strict=True):
        assert set(found) == {"boxes", "labels", "scores"}
        assert 0 < len(found["boxes"]) <= 100
        assert ((found["labels"] >= 1) & (found["labels"] < 5)).all()
        assert found["boxes"].min() >= 0
        assert (found["boxes"].amax(0)[2:] <= torch.tensor([image.shape[2], image.shape[1]])).all()
    detections[0]["scores"].sum().backward()
    assert images[0].grad.abs().max() > 0


def test_scenes_are_not_resized_and_the_papers_images_are():
    images = [torch.rand(3, 128, 160)]
    for name in DETECTION:
        resized, _ = zoo.build(name, **SMALL).eval().transform(images)
        assert resized.image_sizes == [(128, 160)]
        torch.testing.assert_close(resized.tensors[0], (images[0] - 0.5) / 0.25)
    paper = on_meta("FR-ZF-07", width=1)
    assert (paper.transform.min_size, paper.transform.max_size) == ((600,), 1000)
    assert paper.rpn.anchor_generator.sizes == ((128, 256, 512),)
    own = zoo.build("FR-ZF-07", **SMALL, min_size=600, max_size=1000, anchor_sizes=(64, 128))
    assert own.eval().transform(images)[0].image_sizes == [(600, 750)]
    assert own.rpn.head.cls_logits.out_channels == 6


@pytest.mark.parametrize(
    ("box", "cells"),
    [((20, 10, 110, 90), (1, 1, 7, 6)), ((60, 60, 160, 128), (4, 4, 10, 8))],
    ids=["inside", "at the border"],
)
def test_r_fcn_votes_are_means_over_the_parts_of_a_box(box, cells):
    network = warmed("R-FCN-RN50")
    heads, x = network.roi_heads, torch.rand(1, 3, 128, 160)
    with torch.no_grad():
        conv4 = network.backbone(x)
        pooled = heads.box_roi_pool({"0": conv4}, [torch.tensor([box]).float()], [(128, 160)])
        scores, offsets = heads.box_predictor(heads.box_head(pooled))
        own = heads.box_roi_pool
        reduced = own.conv_new_1(own.layer4(conv4)).relu()
        maps = torch.cat([own.rfcn_cls(reduced), own.rfcn_bbox(reduced)], 1)[0]
        assert torch.equal(own.score_maps(conv4)[0], maps[: 5 * 49])
    assert conv4.shape[2:] == maps.shape[1:] == (8, 10)
    assert pooled.shape == (1, 9, 7, 7)
    x1, y1, x2, y2 = cells
    expected = torch.zeros(9, 7, 7)
    for i in range(7):
        for j in range(7):
            top, left = y1 + i * (y2 - y1) // 7, x1 + j * (x2 - x1) // 7
            bottom = y1 + math.ceil((i + 1) * (y2 - y1) / 7)
            right = x1 + math.ceil((j + 1) * (x2 - x1) / 7)
            part = maps.view(9, 7, 7, 8, 10)[:, i, j, top:bottom, left:right]
            expected[:, i, j] = part.mean((1, 2))
    votes = expected.mean((1, 2))
    torch.testing.assert_close(scores[0], votes[:5])
    torch.testing.assert_close(offsets[0], votes[5:].repeat(5))


def test_position_sensitive_pooling_has_its_own_gradient():
    corner = 96 * torch.rand(8, 2, dtype=torch.float64)
    boxes = torch.cat([corner, corner + 16 + 96 * torch.rand(8, 2)], 1).clamp(max=96)
    maps = torch.rand(2, 2 * 9, 6, 6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda maps: detection.position_sensitive_pool(maps, [boxes[:5], boxes[5:]], 3), (maps,)
    )


@pytest.mark.parametrize("name", ["FCN-Alex*", "R-FCN-RN50"])
def test_weights_files_go_round(tmp_path, monkeypatch, name):
    monkeypatch.setattr(registry, "WEIGHTS", tmp_path / "weights")
    with pytest.raises(FileNotFoundError, match=rf"dagcore zoo train '{re.escape(name)}'"):
        zoo.load(name)
    network = zoo.build(name, **SMALL).eval()
    metadata = {
        "width": 1 / 16,
        "classes": ["background", "a", "b", "c", "d"],
        "training_set": "07+12",
        "seed": 3,
        "score": 0.625,
    }
    zoo.save_weights(zoo.find(name).path, network, metadata)
    assert zoo.read_metadata(zoo.find(name).path) == metadata
    found = zoo.load(name)
    assert not found.training
    assert found.classes == ("background", "a", "b", "c", "d")
    before, after = network.state_dict(), found.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype
        exact = value.dim() < 2 or not value.is_floating_point()
        stored = value if exact else value.half().float()
        torch.testing.assert_close(after[key], stored, rtol=0, atol=0)
    assert [entry.name for entry in (tmp_path / "weights").iterdir()] == [zoo.find(name).path.name]


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_users_own_weights(tmp_path, ending):
    path = tmp_path / f"own.{ending}"
    network = zoo.build("DL-VGG", **SMALL).eval()
    state = network.network.state_dict()
    if ending == "pth":
        torch.save({"state_dict": state}, path)
    else:
        save_file(state, path, metadata={"format": "pt"})
        assert zoo.read_metadata(path) == {}
    victim = zoo.load("DL-VGG", path, **SMALL)
    assert victim.classes is None
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(victim(images), network(images), rtol=0, atol=0)


def test_weights_that_do_not_fit(tmp_path):
    path = tmp_path / "own.safetensors"
    zoo.save_weights(path, zoo.build("DL-VGG", **SMALL), {"width": 1 / 16, "classes": [*"abcde"]})
    state = load_file(path)
    with pytest.raises(ValueError, match=r"DL-VGG of width 0.0625 with 9 classes.* 2 of another"):
        zoo.load("DL-VGG", path, num_classes=9)
    with pytest.raises(ValueError, match=r"of width 0.25 with 5 classes.*shape \(conv1_1.weight"):
        zoo.load("DL-VGG", path, width=0.25)
    with pytest.raises(
        ValueError, match=r"FCN-VGG .*missing \(features.conv1_1.weight.*unexpected"
    ):
        zoo.load("FCN-VGG", path)
    save_file({**state, "fc9.bias": torch.zeros(5)}, path)
    with pytest.raises(ValueError, match=r"1 unexpected \(fc9.bias"):
        zoo.load("DL-VGG", path, **SMALL)
    del state["fc8.bias"]
    save_file(state, path)
    with pytest.raises(ValueError, match=r"1 missing \(fc8.bias"):
        zoo.load("DL-VGG", path, **SMALL)


def test_files_that_are_no_weights(tmp_path):
    torch.save({"fc8.bias": sys.exit}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="cannot be read as a state dict"):
        zoo.load("DL-VGG", tmp_path / "code.pth")
    (tmp_path / "words.safetensors").write_text("some words")
    with pytest.raises(ValueError, match="cannot be read as a state dict"):
        zoo.load("DL-VGG", tmp_path / "words.safetensors")
    with pytest.raises(ValueError, match=r"cannot be read as \.safetensors"):
        zoo.read_metadata(tmp_path / "words.safetensors")
    for read in (zoo.read_metadata, lambda path: zoo.load("DL-VGG", path)):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            read(tmp_path / "nothing.safetensors")


def test_weights_that_cannot_be_saved(tmp_path):
    network = zoo.build("FCN-Alex", **SMALL)
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        zoo.save_weights(tmp_path / "a.pth", network, {})
    with pytest.raises(ValueError, match="metadata must be serialisable as JSON"):
        zoo.save_weights(tmp_path / "a.safetensors", network, {"score": math.nan})
    nn.init.constant_(network.network.fc7.weight, 1e5)
    with pytest.raises(ValueError, match=r"finite in float16, fc7\.weight is not"):
        zoo.save_weights(tmp_path / "a.safetensors", network, {})
    assert list(tmp_path.iterdir()) == []


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"DL-RN101, FR-ZF-07.*got 'fcn-vg'; did you mean FCN-VGG"):
        zoo.build("fcn-vg")
    with pytest.raises(ValueError, match=r"FR-ZF-07-DAG, got 'unheard of'$"):
        zoo.load("unheard of")
    with pytest.raises(ValueError, match="width must be a finite number above 0, got 0"):
        zoo.build("DL-VGG", width=0)
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        zoo.build("DL-VGG", num_classes=1)


def test_dagcore_without_torchvision():
    script = """
import sys
sys.modules["torchvision"] = None
import dagcore
dagcore.zoo.build("FCN-VGG", width=1 / 16)
for name in ("DL-RN101", "FR-ZF-07"):
    try:
        dagcore.zoo.build(name)
    except ImportError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count('pip install "dagcore[vision]"') == 2


def test_equal_weights_are_equal_bytes(tmp_path):
    network = zoo.build("FCN-VGG", **SMALL)
    metadata = {f"key{k}": k for k in range(20)}
    for name, given in (("a", metadata), ("b", dict(reversed(metadata.items())))):
        zoo.save_weights(tmp_path / f"{name}.safetensors", network, {"width": 1 / 16, **given})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    for path in registry.WEIGHTS.glob("*.safetensors"):
        content = path.read_bytes()
        header = content[8 : 8 + int.from_bytes(content[:8], "little")].decode().rstrip(" ")
        assert header == json.dumps(json.loads(header), sort_keys=True, separators=(",", ":"))
