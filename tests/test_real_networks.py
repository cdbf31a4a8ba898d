"""Networks with real weights: the engine beside Algorithm 1 as one would write it down."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command_line import attack as attack_files
from command_line import record
from PIL import Image
from support import generator

from dagcore import DAG, PGD, Part, Sample, files, joint_attack, victims
from dagcore.__main__ import main
from dagcore.defences.training import attacked
from dagcore.engine import read_scores
from dagcore.evaluation.tog import goal_targets
from dagcore.metrics import DetectionErrors
from dagcore.perturbation import round_to_8_bits

REAL = Path(__file__).parents[2] / "shared" / "real"
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="../shared/real is not there")

GAMMA = 0.5 / 255
NAMES = ("deeplab_voc", "deeplab_voc_narrow")
SIDE = 161  # of the small photographs


@pytest.fixture(scope="module")
def networks():
    """The loaders of ../shared/real."""
    sys.path.insert(0, str(REAL))
    import networks

    yield networks
    sys.path.remove(str(REAL))
    del sys.modules["networks"]


@pytest.fixture(scope="module")
def deeplabs(networks):
    return {name: networks.load_deeplab(REAL / f"{name}.safetensors") for name in NAMES}


@pytest.fixture(scope="module")
def nanodet(networks):
    network = networks.load_nanodet(REAL / "nanodet_coco.safetensors")
    return victims.dense_detector(network, threshold=0.35, classes=networks.COCO)


@pytest.mark.parametrize("name", NAMES)
def test_a_prepared_copy_follows_the_network(networks, name):
    """After all its weights have changed, as in training."""
    network = networks.load_deeplab(REAL / f"{name}.safetensors")
    prepared = victims.prepare(network, example=torch.rand(1, 3, 97, 97))
    image = torch.rand(1, 3, 97, 97, generator=generator(0))
    labels = read_scores(network(image), image).argmax(1)
    with torch.no_grad():
        for value in (*network.parameters(), *network.buffers()):
            if value.is_floating_point():
                value.mul_(1.01)
    attack = PGD(epsilon=2 / 255, alpha=1 / 255, steps=2)
    mixed = attacked(attack, prepared, image, labels, share=1, generator=generator(1))
    anew = victims.prepare(network, example=torch.rand(1, 3, 97, 97))
    assert torch.equal(prepared(image), anew(image))
    expected = attack(anew, image, labels, generator=generator(1)).last
    assert torch.equal(mixed, expected)


def as_images(image, side=None):
    """A Pillow image as (1, 3, H, W) in [0, 1], squeezed to a square."""
    image = image.convert("RGB")
    if side is not None:
        image = image.resize((side, side), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].contiguous().float() / 255


def photograph(name, side=None):
    return as_images(Image.open(REAL / "photos" / f"{name}.png"), side)


def of_skimage(name, side):
    data = pytest.importorskip("skimage.data")
    return as_images(Image.fromarray(getattr(data, name)()), side)


def scores_at_targets(model, images):
    scores = model(images)
    if scores.dim() == 4 and scores.shape[2:] != images.shape[2:]:
        scores = F.interpolate(scores, images.shape[2:], mode="bilinear", align_corners=True)
    return scores


def own_labels(model, images):
    """What a segmenter sees, and each class's next."""
    with torch.no_grad():
        labels = scores_at_targets(model, images).argmax(1)
    return labels, (labels + 1) % 21


def plain_loop(model, image, labels, adversarial, max_iter=200, levels=False, margin=0.0):
    """Algorithm 1 on one image: the image, the updates, and the active targets of each iterate."""
    counted = labels != 255
    true, wanted = torch.where(counted, labels, 0), torch.where(counted, adversarial, 0)
    exact, counts = image.clone(), []
    while True:
        x = ((exact * 255).round() / 255 if levels else exact).detach().requires_grad_()
        scores = scores_at_targets(model, x)
        behind = scores.max(1).values - scores.gather(1, true[:, None])[:, 0]
        active = counted & ((scores.argmax(1) == true) | (behind < margin))
        counts.append(int(active.sum()))
        if not counts[-1] or len(counts) > max_iter:
            return x.detach(), len(counts) - 1, counts
        gain = scores.gather(1, wanted[:, None]) - scores.gather(1, true[:, None])
        (gradient,) = torch.autograd.grad((gain[:, 0] * active).sum(), x)
        step = x.new_tensor(GAMMA) / gradient.abs().max()
        exact = (exact.detach() + step * gradient).clamp(0, 1)


def check_equal(result, plain):
    """A result of one image is the plain loop's: as many updates, give or take 2.

    Rounding that differs moves units of ReLU6 across their bends. Where none does, so that all
    counts are the same, the images are.
    """
    image, updates, counts = plain
    assert result.converged.tolist() == [counts[-1] == 0]
    assert abs(int(result.iterations) - updates) <= 2
    np.testing.assert_allclose(result.active[:3, 0], counts[:3], rtol=0.02)
    if result.active[: updates + 1, 0].tolist() == counts:
        torch.testing.assert_close(result.adversarial, image, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "low_resolution", "levels"),
    [
        *(("deeplab_voc_narrow", low, levels) for low in (True, False) for levels in (None, 256)),
        ("deeplab_voc", True, 256),
        ("deeplab_voc", False, None),
    ],
)
def test_the_engine_is_the_plain_loop(networks, name, low_resolution, levels):
    model = networks.load_deeplab(REAL / f"{name}.safetensors", low_resolution)
    image = photograph("bird", SIDE)
    labels, adversarial = own_labels(model, image)
    assert set(labels.unique().tolist()) >= {0, networks.VOC.index("bird")}
    result = DAG(levels=levels)(model, image, labels, adversarial)
    assert result.converged.all()
    check_equal(result, plain_loop(model, image, labels, adversarial, levels=levels is not None))


@pytest.mark.parametrize("name", ["bird", "dog"])
def test_iterate_by_iterate_at_the_networks_size(deeplabs, name):
    model = deeplabs["deeplab_voc_narrow"]
    image = photograph(name)
    labels, adversarial = own_labels(model, image)
    updates = 3
    result = DAG(max_iter=updates)(model, image, labels, adversarial)
    expected, _, counts = plain_loop(model, image, labels, adversarial, updates)
    assert result.active[:2, 0].tolist() == counts[:2]
    np.testing.assert_allclose(result.active[:, 0], counts, rtol=0.005)
    change = (expected - image, result.adversarial - image)
    assert F.cosine_similarity(change[0].flatten(), change[1].flatten(), dim=0) > 0.99


def test_the_dog_at_small_size_moves_as_in_the_plain_loop(deeplabs):
    """A long attack: its first updates, since rounding leads the rest apart."""
    model = deeplabs["deeplab_voc"]
    image = photograph("dog", SIDE)
    labels, adversarial = own_labels(model, image)
    result = DAG(max_iter=8)(model, image, labels, adversarial)
    _, _, counts = plain_loop(model, image, labels, adversarial, 8)
    np.testing.assert_allclose(result.active[:, 0], counts, rtol=0.02)


@pytest.fixture(scope="module")
def pair(deeplabs):
    """Two small birds with their targets, and the plain loop's updates of each."""
    model = deeplabs["deeplab_voc_narrow"]
    bird = photograph("bird", SIDE)
    images = torch.cat([bird, bird.flip(3)])
    labels, adversarial = own_labels(model, images)
    plain = [
        plain_loop(model, images[n : n + 1], labels[n : n + 1], adversarial[n : n + 1])
        for n in range(2)
    ]
    return model, images, labels, adversarial, [updates for _, updates, _ in plain]


def test_a_batch(pair):
    model, images, labels, adversarial, updates = pair
    result = DAG()(model, images, labels, adversarial)
    assert result.converged.all()
    np.testing.assert_allclose(result.iterations, updates, atol=2, rtol=0)


def test_a_stream(pair):
    model, images, labels, adversarial, updates = pair
    order = [0, 1, 0]
    samples = (Sample(images[n], labels[n], adversarial[n], key=k) for k, n in enumerate(order))
    found = {r.key: r for r in DAG().stream(model, samples, slots=2)}
    for k, n in enumerate(order):
        assert found[k].converged.all()
        assert abs(int(found[k].iterations) - updates[n]) <= 2


def test_prepared(pair):
    model, images, labels, adversarial, updates = pair
    result = DAG()(victims.prepare(model), images[:1], labels[:1], adversarial[:1])
    assert result.converged.all()
    assert abs(int(result.iterations) - updates[0]) <= 2


def test_both_at_once(deeplabs):
    image = photograph("bird", SIDE)
    parts = [Part(model, *own_labels(model, image)) for model in deeplabs.values()]
    result = joint_attack(DAG(levels=256), parts, image)
    assert result.converged.all()
    shown = round_to_8_bits(result.adversarial)
    for part in parts:
        seen, _ = own_labels(part.model, shown)
        assert not (seen == part.labels).any()
    alone = DAG(levels=256)(parts[0].model, image, parts[0].labels, parts[0].adversarial_labels)
    seen, _ = own_labels(parts[1].model, alone.adversarial)
    assert (seen == parts[1].labels).float().mean() > 0.5


def test_no_target_is_right_in_the_file(deeplabs, tmp_path):
    model = deeplabs["deeplab_voc_narrow"]
    image = photograph("bird", SIDE)
    labels, adversarial = own_labels(model, image)
    right = {}
    for levels in (None, 256):
        result = DAG(levels=levels)(model, image, labels, adversarial)
        assert result.converged.all()
        files.write_image(tmp_path / "attacked.png", result.adversarial[0])
        seen, _ = own_labels(model, files.read_image(tmp_path / "attacked.png")[None])
        right[levels] = int((seen == labels).sum())
    assert right[256] == 0
    assert right[None] > 100


@pytest.mark.parametrize("epsilon", [0.03, 0.01, 1.6 / 255, 8 / 255])
def test_the_file_is_within_epsilon(deeplabs, tmp_path, epsilon):
    model = deeplabs["deeplab_voc_narrow"]
    image = photograph("bird", SIDE)
    result = DAG(levels=256, epsilon=epsilon, max_iter=20)(model, image, *own_labels(model, image))
    files.write_image(tmp_path / "attacked.png", result.adversarial[0])
    change = (files.read_image(tmp_path / "attacked.png")[None] - image).abs().max()
    assert 0 < float(change) <= epsilon + 1e-7


def test_margin(deeplabs):
    """Every target has lost by the margin, in the file too, as in a plain loop."""
    model, margin = deeplabs["deeplab_voc_narrow"], 1.0
    image = photograph("bird", SIDE)
    labels, adversarial = own_labels(model, image)
    result = DAG(levels=256, margin=margin)(model, image, labels, adversarial)
    assert result.converged.all()
    check_equal(result, plain_loop(model, image, labels, adversarial, levels=True, margin=margin))
    with torch.no_grad():
        scores = scores_at_targets(model, round_to_8_bits(result.adversarial))
    behind = scores.max(1).values - scores.gather(1, labels[:, None])[:, 0]
    assert float(behind.min()) > margin - 1e-4


@pytest.mark.parametrize("name", ["chelsea", "astronaut"])
def test_nanodet_is_attacked_as_by_the_plain_loop(nanodet, name):
    image = of_skimage(name, 416)
    targets = nanodet.dense_targets(image, confidence=0.35, generator=generator(0))
    labels, adversarial = targets.labels, targets.adversarial_labels
    assert targets.counts[0] > 3
    result = DAG(max_iter=6)(nanodet, image, labels, adversarial)
    check_equal(result, plain_loop(nanodet, image, labels, adversarial, 6))


def test_no_detection_is_left_in_the_file(nanodet, tmp_path):
    image = of_skimage("chelsea", 224)
    targets = nanodet.dense_targets(image, confidence=0.35, adversarial="vanish")
    assert targets.counts[0] > 3
    attack = DAG(levels=256, margin=0.5)
    result = attack(nanodet, image, targets.labels, targets.adversarial_labels)
    assert result.converged.all()
    files.write_image(tmp_path / "attacked.png", result.adversarial[0])
    kept = files.read_image(tmp_path / "attacked.png")[None]
    assert not attack.count_active(nanodet, kept, targets.labels, targets.adversarial_labels)


VICTIM = """
import sys
sys.path.insert(0, {real!r})
import networks
from dagcore import victims

def deeplab():
    network = networks.load_deeplab({real!r} + "/deeplab_voc_narrow.safetensors")
    return victims.Victim(network, classes=networks.VOC)

def nanodet():
    network = networks.load_nanodet({real!r} + "/nanodet_coco.safetensors")
    return victims.dense_detector(network, threshold=0.35, classes=networks.COCO)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the networks as --model finds them, and a photograph for each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("real_victim.py").write_text(VICTIM.format(real=str(REAL)))
    for what, image in (("bird", photograph("bird", SIDE)), ("cat", of_skimage("chelsea", 224))):
        Path(what).mkdir()
        files.write_image(Path(what) / f"{what}.png", image[0])
    return tmp_path


@pytest.mark.parametrize(("model", "what"), [("deeplab", "bird"), ("nanodet", "cat")])
def test_attack_from_the_command_line(folder, model, what):
    assert attack_files(model=f"real_victim:{model}", image=f"{what}/{what}.png") == 0
    numbers = record(what)
    assert numbers["status"] == "converged"
    assert numbers["targets"] > 3
    assert 0 < numbers["correct_before"] <= numbers["targets"]
    assert numbers["active_after_rounding"] == 0
    assert numbers["settings"]["levels"] == 256


@pytest.mark.parametrize(("model", "what"), [("deeplab", "bird"), ("nanodet", "cat")])
def test_run_from_the_command_line(folder, model, what):
    options = ["--data", what, "--model", f"real_victim:{model}", "--out", "out"]
    assert main(["run", *options, "--figures", "0"]) == 0
    (line,) = Path("out/images.jsonl").read_text().splitlines()
    kept = json.loads(line)
    assert kept["status"] == "converged"
    assert kept["active_after_rounding"] == 0


def test_nanodet_and_togs_goals(nanodet):
    """One look at four detections; `tests/test_tog.py` measures the goals on more images."""
    image = of_skimage("chelsea", 416)
    with torch.no_grad():
        truth = nanodet.confident(nanodet.detect(image.clone())[0], 0.35, image)
    targets = goal_targets(nanodet, image[0], truth)
    attack = PGD(epsilon=8 / 255, alpha=2 / 255, steps=10, tolerance=None)
    errors = {}
    for goal, aim in targets.items():
        measure = DetectionErrors(len(nanodet.classes) + 1, min_score=0.35)
        goals = aim.adversarial if isinstance(aim.adversarial, str) else aim.adversarial[None]
        result = attack(nanodet, image, aim.labels[None], goals, generator=generator(0))
        with torch.no_grad():
            (found,) = nanodet.detect(result.last)
        found["labels"] += 1  # 0 is the background of the measure
        measure.update(found, truth["boxes"], truth["labels"] + 1)
        errors[goal] = measure.compute()
    assert errors["vanish"].objects == 4
    assert errors["vanish"].detections < 3
    assert errors["mislabel"].correct <= 1
    assert errors["mislabel"].detections > 3
    assert errors["untargeted"].correct <= 1
    assert errors["fabricate"].background > 8
