"""Training the zoo: resumable, the same again, and what its commands print."""

import functools
import hashlib
import json
import math
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dagcore import data, victims, zoo
from dagcore.__main__ import main
from dagcore.data.scenes import crop
from dagcore.files import write_image
from dagcore.zoo import pictures, registry, training
from dagcore.zoo.evaluation import evaluate

TINY = {"samples": 80, "start_samples": 64, "width": 1 / 16, "test_scenes": 3}
SHORT = ["--samples", "16", "--start-samples", "32", "--test-scenes", "2"]
SHIPPED = [entry.name for entry in registry.EVERY if entry.path.is_file()]
TASKS = ("segmentation", "detection")


class Interruption(Exception):
    pass


def interrupt(after):
    """A callback that ends a training once it has seen that many samples."""

    def callback(progress):
        if progress.samples >= after:
            raise Interruption

    return callback


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A package without shipped weights."""
    monkeypatch.setattr(registry, "WEIGHTS", tmp_path / "weights")
    return tmp_path / "weights"


@pytest.mark.parametrize("name", ["DL-VGG-PGD", "FR-ZF-07-DAG"])
def test_an_interrupted_training_ends_with_the_same_weights(tmp_path, name):
    slug, seen, parts = zoo.find(name).slug, [], []
    torch.manual_seed(7)
    before = torch.get_rng_state()
    undisturbed = training.train(name, out=tmp_path / "whole", callback=seen.append, **TINY)
    assert torch.equal(torch.get_rng_state(), before)
    assert seen[-1].samples == seen[-1].total == 80
    assert seen[0].name.startswith("start-")
    assert seen[0].total == 64
    torch.rand(5)
    options = {"out": tmp_path / "parts", "checkpoint_steps": 2, **TINY}
    with pytest.raises(Interruption):
        training.train(name, callback=interrupt(after=48), **options)
    assert not (tmp_path / "parts" / f"{slug}.safetensors").exists()
    resumed = training.train(name, callback=parts.append, **options)
    assert 0 < len(parts) < len(seen)
    assert parts == seen[-len(parts) :]
    one, other = load_file(undisturbed), load_file(resumed)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert zoo.read_metadata(undisturbed) == zoo.read_metadata(resumed)
    logs = [(tmp_path / part / f"{slug}.jsonl").read_text() for part in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_training_against_an_attack(tmp_path, weights, capfd):
    """By a name of the zoo, and by options for any network, which is not put into the package."""
    options = ["--out", str(tmp_path / "out"), *SHORT]
    train = ["zoo", "train", "FCN-Alex", *options]
    given = ["--adversarial", "segpgd", "--epsilon", "2/255", "--steps", "1"]
    assert main([*train, *given]) == 0
    path = tmp_path / "out" / "fcn-alex-segpgd.safetensors"
    assert f"written to {path}" in capfd.readouterr().err
    assert not weights.exists()
    known = zoo.read_metadata(path)
    found = [known[key] for key in ("attack", "epsilon", "steps", "training_set", "test_scenes")]
    assert found == ["segpgd", pytest.approx(2 / 255), 1, "07", 2]
    assert zoo.load("FCN-Alex", path).classes == data.SCENE_CLASSES
    given = {"samples": 16, "start_samples": 32, "test_scenes": 2}
    clean = load_file(training.train("FCN-Alex", out=tmp_path / "out", **given))
    assert not torch.equal(clean["score_fr.weight"], load_file(path)["score_fr.weight"])
    capfd.readouterr()
    assert main(["zoo", "train", "FCN-VGG-PGD", *options, "--adversarial", "pgd"]) == 2
    assert "of a network trained on clean images, got FCN-VGG-PGD" in capfd.readouterr().err
    assert main([*train, "--adversarial", "pgd", "--epsilon", "0"]) == 2
    assert "epsilon must be a finite number above 0, got 0" in capfd.readouterr().err
    robust = {entry.name: entry for entry in zoo.ROBUST}
    assert robust["FCN-VGG-PGD"].adversary == zoo.Adversary("pgd", 2 / 255, 3)


def test_what_a_training_leaves(tmp_path):
    path = training.train("DL-VGG", out=tmp_path, **TINY)
    assert {file.name for file in tmp_path.iterdir()} == {
        f"{name}.{ending}"
        for name in ("dl-vgg", "start-vgg-16-1of16")
        for ending in ("pt", "jsonl", "png", "safetensors")
    }
    with Image.open(tmp_path / "dl-vgg.png") as picture:
        assert picture.format == "PNG"
    lines = [json.loads(line) for line in (tmp_path / "dl-vgg.jsonl").read_text().splitlines()]
    assert lines[-1]["samples"] == 80
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["cross_entropy"])
    known = zoo.read_metadata(path)
    assert known["width"] == 1 / 16
    assert known["classes"] == list(data.SCENE_CLASSES)
    assert known["scenes"] == data.SCENES_VERSION == 2
    assert known["training_set"] == "07+12"
    start = (tmp_path / "start-vgg-16-1of16.safetensors").read_bytes()
    assert known["start"] == hashlib.sha256(start).hexdigest()
    assert known["seed"] == training.seed_of_name("DL-VGG")
    assert known["samples"] == 80
    assert known["test_scenes"] == 3
    assert known["versions"]["torch"] == str(torch.__version__)
    network = zoo.load("DL-VGG", path)
    scenes = data.Scenes("07", "test", count=3)
    assert evaluate(network, scenes).mean == pytest.approx(known["score"], abs=0.01)


def test_losses_fall(tmp_path):
    options = {**TINY, "samples": 480, "start_samples": 960, "test_scenes": 1}
    training.train("FCN-Alex", out=tmp_path, **options)
    for name, fall in (("fcn-alex", 0.5), ("start-alexnet-1of16", 0.03)):
        log = (tmp_path / f"{name}.jsonl").read_text()
        lines = [json.loads(line) for line in log.splitlines()]
        assert lines[-1]["loss"] < math.log(len(data.SCENE_CLASSES)) - fall


@pytest.mark.parametrize("name", sorted({e.architecture: e.name for e in zoo.ENTRIES}.values()))
def test_networks_begin_with_their_backbone(name):
    """All layers of the start have their place, and nothing else is changed."""
    entry = zoo.find(name)
    backbone = registry.BACKBONES[entry.backbone].build(width=1 / 16)
    start = {key: torch.full_like(value, 3) for key, value in backbone.state_dict().items()}
    options = {} if entry.architecture in registry.RESIDUAL else {"norm": True}
    network = training.inside(zoo.build(name, num_classes=13, width=1 / 16, **options))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    brought = training.begin(network, {**start, "classifier.weight": torch.ones(13, 8)})
    changed = {k: v for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    assert brought == set(changed)
    assert len(changed) == len(start)
    assert all(bool((value == 3).all()) for value in changed.values())
    assert [key for key in changed if key.endswith(("score_fr.weight", "fc8.weight"))] == []
    with pytest.raises(ValueError, match=r"start must fit the network, which has no place for fc9"):
        training.begin(network, {"fc9": torch.zeros(1)})


@pytest.mark.parametrize("start_rate", [0.0, 0.25, 1.0])
def test_layers_of_the_start_learn_at_their_own_rate(tmp_path, start_rate):
    """The first step of AdamW moves each weight by its learning rate, or not at all."""
    recipe = training.Recipe(800, learning_rate=1e-3, weight_decay=0.0, start_rate=start_rate)
    path = training.train_start("ZF", samples=32, width=1 / 16, out=tmp_path)
    tuned = training.FineTuning(
        zoo.find("FR-ZF-07"), recipe, seed=0, width=1 / 16, device="cpu", start=path
    )
    before = {
        key: value.clone() for key, value in training.inside(tuned.network).named_parameters()
    }
    tuned.advance()
    peak = 1e-3 * training.rate(0, tuned.steps)
    moved = {
        key: float((value - before[key]).detach().abs().max()) / peak
        for key, value in training.inside(tuned.network).named_parameters()
    }
    groups = [
        {key for key in moved if (key in tuned.brought) is brought} for brought in (False, True)
    ]
    assert len(groups[0]) > 5
    assert len(groups[1]) > 5
    for keys, share in zip(groups, (1.0, start_rate), strict=True):
        assert max(moved[key] for key in keys) == pytest.approx(share, rel=2e-3)


def test_half_of_a_detectors_batch_is_attacked_at_its_best_proposals(tmp_path, monkeypatch):
    start = training.train_start("ZF", width=1 / 16, samples=32, out=tmp_path)
    entry = zoo.find("FR-ZF-07-DAG")
    own = training.FineTuning(
        entry, training.recipe_of(entry), seed=0, width=1 / 16, device="cpu", start=start
    )
    own.step = own.steps - 1  # the radius has grown to its full size
    given = {}
    attacked = training.attacked

    def spied(attack, victim, images, labels, **options):
        given.update(options, images=images, labels=labels)
        return attacked(attack, victim, images, labels, **options)

    monkeypatch.setattr(training, "attacked", spied)
    monkeypatch.setattr(
        victims.Detector,
        "dense_targets",
        functools.partialmethod(victims.Detector.dense_targets, min_score=0.0),
    )
    batch = own.batch()
    seen = own.seen(batch)
    half = len(seen) // 2
    assert len(given["images"]) == half
    assert half <= given["boxes"].shape[1] <= training.PROPOSALS
    assert torch.equal(seen[half:], batch.images[half:])
    moved = (seen[:half] - batch.images[:half]).flatten(1).abs().amax(1)
    assert (moved > 0).any()
    assert moved.max() <= 2 / 255 + 1e-6
    found = torch.cat(batch.labels[:half]).unique()
    assert set(given["labels"].unique().tolist()) <= {*found.tolist(), 255}


def test_two_training_sets_have_one_start(tmp_path, monkeypatch):
    """Their networks begin with one backbone, which is trained once, and heads of their own."""
    begun = {}
    whole = training.begin

    def begin(network, start):
        brought = whole(network, start)
        begun[len(begun)] = {k: v.clone() for k, v in network.network.state_dict().items()}
        return brought

    monkeypatch.setattr(training, "begin", begin)
    options = {**TINY, "out": tmp_path, "samples": 8, "test_scenes": 1}
    for name in ("FCN-VGG", "FCN-VGG*"):
        path = training.train(name, **options)
    written = (tmp_path / "start-vgg-16-1of16.safetensors").stat().st_mtime_ns
    assert written < path.stat().st_mtime_ns
    one, other = begun.values()
    state = load_file(tmp_path / "start-vgg-16-1of16.safetensors")
    assert "conv5_3.weight" in state
    for key, value in state.items():
        if not key.startswith("classifier."):
            assert torch.equal(one[f"features.{key}"], value.to(one[f"features.{key}"].dtype))
            assert torch.equal(one[f"features.{key}"], other[f"features.{key}"])
    assert not torch.equal(one["score_fr.weight"], other["score_fr.weight"])


def test_a_folder_with_another_start(tmp_path):
    options = {"width": 1 / 16, "out": tmp_path}
    path = training.train_start("ZF", samples=32, **options)
    assert zoo.read_metadata(path)["samples"] == 32
    again = training.train_start(
        "ZF", samples=32, callback=lambda _: pytest.fail("trained"), **options
    )
    assert again == path
    with pytest.raises(ValueError, match=r"another training's start.*'samples': 64"):
        training.train_start("ZF", samples=64, **options)
    with pytest.raises(ValueError, match=r"backbone must be 'AlexNet', 'ZF', .*, got 'LeNet'"):
        training.train_start("LeNet", **options)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        training.train_start("ZF", samples=0, **options)


def test_crops_come_down_to_the_materials_of_scenes():
    crops = pictures.Crops({"07": 30, "12": 30})
    assert len(crops) == 60
    chosen = list(range(60))
    plain, weak, strong = (crops.batch(chosen, material) for material in (0, 0.0075, 0.15))
    classes = torch.cat(plain.labels)
    assert (classes == 0).sum() == 6  # no object
    assert len(classes.unique()) > 8
    moved = (strong.images - plain.images).abs().amax((1, 2, 3)) > 0.05
    assert not moved[classes == 0].any()
    assert 0.6 < float(moved[classes > 0].float().mean()) < 1
    torch.testing.assert_close(
        weak.images - plain.images, (strong.images - plain.images) / 20, rtol=1e-4, atol=1e-6
    )
    # What a network sees last is what a scene is, give or take its rounding to 8 bits.
    drawn = torch.stack([crop("07", k, 0.0075)[0] for k in range(30)]).float() / 255
    apart = (drawn - weak.images[:30]).abs()
    assert (apart < 1.01 / 255).float().mean() > 0.98  # but where strong ones are cut off


def test_another_seed_gives_other_weights(tmp_path):
    assert len({training.seed_of_name(entry.name) for entry in zoo.ENTRIES}) == 13
    options = {**TINY, "samples": 16, "test_scenes": 1}
    one, other = (
        load_file(training.train("FCN-VGG", out=tmp_path / str(seed), seed=seed, **options))
        for seed in (1, 2)
    )
    assert not torch.equal(one["score_fr.weight"], other["score_fr.weight"])


def test_a_folder_with_another_trainings_checkpoint(tmp_path):
    options = {**TINY, "samples": 16, "test_scenes": 1}
    training.train("FCN-VGG", out=tmp_path, seed=1, **options)
    with pytest.raises(ValueError, match=r"another training's.*'seed': 1} instead of {'seed': 2}"):
        training.train("FCN-VGG", out=tmp_path, seed=2, **options)
    (tmp_path / "fcn-vgg.pt").write_text("some words")
    with pytest.raises(ValueError, match=r"fcn-vgg\.pt cannot be read"):
        training.train("FCN-VGG", out=tmp_path, seed=1, **options)


def test_masks_and_boxes_move_with_the_image():
    """Of a picture that is its own mask, with one box around what is not the background."""
    mask = torch.zeros(6, 64, 80, dtype=torch.int64)
    mask[:, 20:44, 30:66] = 3
    image = (mask[:, None] / 6).expand(-1, 3, -1, -1).contiguous()
    box = torch.tensor([[30.0, 20.0, 66.0, 44.0]])
    batch = pictures.Batch(image, mask, [box] * 6, [torch.tensor([3])] * 6)
    torch.manual_seed(0)
    for zoom in ((1.0, 1.0), (0.7, 0.9), (1.1, 1.4)):
        found = pictures.augment(batch, zoom)
        for k in range(6):
            seen = found.masks[k] == 3
            light = found.images[k, 0]
            assert light[seen].median() > light[found.masks[k] == 0].median()
            rows, columns = seen.any(1).nonzero(), seen.any(0).nonzero()
            around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            torch.testing.assert_close(
                found.boxes[k][0], torch.stack(around).float(), rtol=0, atol=1.01
            )
            assert found.labels[k].tolist() == [3]
        assert bool((found.masks == 255).any()) == (zoom[1] < 1)


def test_boxes_that_leave_the_frame_are_left_out():
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [30.0, 20.0, 50.0, 40.0]])
    scale, center, size = torch.tensor([2.0, 2.0]), torch.zeros(2), torch.tensor([80, 64])
    moved, kept = pictures.move(boxes, scale, center, size)
    assert kept.tolist() == [False, True]
    torch.testing.assert_close(moved, torch.tensor([[20.0, 8.0, 60.0, 48.0]]))
    moved, kept = pictures.move(torch.zeros(0, 4), scale, center, size)
    assert moved.shape == (0, 4)
    assert kept.shape == (0,)


def test_arguments_are_checked(tmp_path):
    """Before anything is trained or written."""
    for key in ("samples", "start_samples", "checkpoint_steps", "test_scenes"):
        with pytest.raises(
            ValueError, match=f"{key.removeprefix('start_')} must be at least 1, got 0"
        ):
            training.train("DL-VGG", out=tmp_path, **{**TINY, key: 0})
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        training.train("DL-VGG", out=tmp_path, seed=-1)
    with pytest.raises(ValueError, match="name must be one of FCN-Alex, "):
        training.train("AlexNet", out=tmp_path)
    assert list(tmp_path.iterdir()) == []
    network = zoo.build("FCN-Alex", num_classes=13, width=1 / 16)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        evaluate(network, count=0)
    with pytest.raises(ValueError, match="protocol must be 'voc2007', 'voc2010' or 'coco'"):
        evaluate(network, protocol="voc")


def test_the_mode_of_a_network_is_left_as_it_was():
    network = zoo.build("FCN-Alex", num_classes=13, width=1 / 16, norm=True)
    network.classes = data.SCENE_CLASSES
    before = {key: value.clone() for key, value in network.state_dict().items()}
    evaluate(network, count=1)
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_perfect_network_scores_100(monkeypatch):
    scenes = data.Scenes("07", "test", count=4)

    class Oracle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.examples = iter(scenes)

        def forward(self, images):
            mask = next(self.examples).mask.long()
            mask[mask == 255] = 1
            return torch.nn.functional.one_hot(mask, 13).permute(2, 0, 1)[None].float()

    victim = victims.Victim(Oracle(), classes=data.SCENE_CLASSES)
    assert evaluate(victim, scenes).mean == 100

    class Detector(Oracle):
        classes = data.SCENE_CLASSES

        def forward(self, images):
            example = next(self.examples)
            count = len(example.boxes)
            return [{"boxes": example.boxes, "labels": example.labels, "scores": torch.ones(count)}]

    for protocol in ("voc2007", "voc2010", "coco"):
        assert evaluate(Detector(), scenes, protocol=protocol).mean == pytest.approx(100)


def test_examples_without_masks():
    example = next(iter(data.Scenes(count=1)))
    example = data.Example("a1", example.image, None, example.boxes, example.labels, example.labels)
    network = zoo.build("FCN-Alex", num_classes=13, width=1 / 16)
    with pytest.raises(ValueError, match="examples must have masks, a1 has none"):
        evaluate(network, [example])


def test_the_commands(tmp_path, weights, capfd):
    """Two networks in processes of their own, trained, installed, listed and measured."""
    names, out = ["FCN-Alex", "FR-ZF-07"], tmp_path / "out"
    assert main(["zoo", "train", *names, "--out", str(out), "--install", *SHORT]) == 0
    told = capfd.readouterr().err
    for name in names:
        assert f"{name}: " in told
        file = weights / zoo.find(name).path.name
        assert f"written to {file}" in told
        assert file.read_bytes() == (out / file.name).read_bytes()
    assert main(["zoo", "list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capfd.readouterr().out)}
    assert list(rows) == [entry.name for entry in (*zoo.ENTRIES, *zoo.ROBUST)]
    for name, row in rows.items():
        assert (row["sha256"] is None) == (name not in names)
    content = zoo.find("FR-ZF-07").path.read_bytes()
    assert rows["FR-ZF-07"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert rows["FR-ZF-07"]["bytes"] == len(content)
    state = load_file(zoo.find("FCN-Alex").path)
    assert rows["FCN-Alex"]["parameters"] == sum(value.numel() for value in state.values())
    assert main(["zoo", "list"]) == 0
    table = capfd.readouterr().out
    assert rows["FCN-Alex"]["sha256"][:12] in table
    assert table.count("not trained yet") == len(rows) - 2
    assert main(["zoo", "evaluate", *names, "--images", "2", "--protocol", "coco"]) == 0
    table, told = capfd.readouterr()
    assert "mIoU" in table
    assert "mAP (coco)" in table
    assert all(f"{name}: 2/2\n" in told for name in names)


def test_attacking_a_network_of_the_zoo(tmp_path, weights, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = zoo.build("FCN-VGG*", num_classes=13, width=1 / 16)
    metadata = {"width": 1 / 16, "classes": data.SCENE_CLASSES}
    zoo.save_weights(zoo.find("FCN-VGG*").path, network, metadata)
    write_image(tmp_path / "scene.png", data.Scenes(count=1)[0].image)
    attack = ["attack", "scene.png", "--out", "out", "--max-iter", "2", "--model"]
    assert main([*attack, "FCN-VGG*"]) == 0
    record = json.loads((tmp_path / "out" / "scene.json").read_text())
    assert record["num_classes"] == 13
    assert record["label_map"] == [128, 160]  # pixels, not cells of the score map
    capfd.readouterr()
    assert main([*attack, "DL-VGG"]) == 2
    assert "DL-VGG has no weights in" in capfd.readouterr().err
    assert main([*attack, "FR-XX-07"]) == 2
    assert "did you mean FR-ZF-07?" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "AlexNet"], "name must be one of FCN-Alex, "),
        (
            ["train", "FCN-VGG", "--adversarial", "pgd", "--epsilon", "0.1", "--install"],
            "--install requires networks that the zoo ships, with the same --adversarial",
        ),
        (["train", "--samples", "0"], "Invalid value for '--samples'"),
        (["train", "DL-VGG", "--device", "nowhere", "--out", "{}"], "--device must be cpu"),
        (["evaluate", "fcn-vg"], "did you mean FCN-VGG"),
        (["evaluate", "FCN-VGG"], "FCN-VGG has no weights in "),
        (["evaluate", "--protocol", "voc"], "Invalid value for '--protocol'"),
        (["unknown"], "No such command 'unknown'"),
    ],
)
def test_bad_input_is_one_line(tmp_path, weights, capfd, arguments, message):
    assert main(["zoo", *(word.format(tmp_path) for word in arguments)]) == 2
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err.startswith("dagcore zoo: error: ")
    assert output.err.count("\n") == 1
    assert message in output.err


def test_listing_the_shipped_weights():
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "dagcore", "zoo", "list", "--json"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    rows = {row["name"]: row for row in json.loads(run.stdout)}
    assert [name for name, row in rows.items() if row["sha256"]] == SHIPPED
    files = {file.name for file in registry.WEIGHTS.glob("*.safetensors")}
    assert files == {zoo.find(name).path.name for name in SHIPPED}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_are_what_they_say(name):
    entry = zoo.find(name)
    known = zoo.read_metadata(entry.path)
    assert known["width"] == entry.width
    assert known["classes"] == list(data.SCENE_CLASSES)
    assert known["training_set"] == entry.training_set
    assert known["seed"] == training.seed_of_name(name)
    assert known["samples"] == training.recipe_of(entry).samples
    assert known["test_scenes"] == 200
    assert known["score"] >= 60
    network = zoo.load(name)
    assert network.classes == data.SCENE_CLASSES
    assert all(value.isfinite().all() for value in network.state_dict().values())


@pytest.mark.parametrize("task", TASKS)
def test_shipped_networks_see(task):
    shipped = [name for name in SHIPPED if zoo.find(name).task == task]
    if not shipped:
        pytest.skip(f"no {task} network has weights in the package yet")
    assert evaluate(shipped[0], count=12).mean > 35
