"""`dagcore run`: data sets of every kind, and what becomes of their broken members."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from safetensors.torch import load_file

import dagcore
from dagcore import zoo
from dagcore.__main__ import main
from dagcore.data import Scenes
from dagcore.evaluation import settings as run_settings
from dagcore.evaluation import store as results
from dagcore.evaluation.settings import tomllib
from dagcore.evaluation.summary import summarise
from dagcore.metrics import AveragePrecision, MeanIoU
from dagcore.perturbation import perceptibility, round_to_8_bits
from dagcore.zoo.evaluation import evaluate

# Five kinds of local contrast, at half the size of the image: easily attacked to the end.
VICTIM = """
import torch
from torch import nn
from dagcore.victims import Victim

def make():
    net = nn.Conv2d(3, 5, 2, 2, bias=False)
    weight = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    net.weight.data = weight - weight.mean((1, 2, 3), keepdim=True)
    return Victim(net, classes=("sky", "fur", "eye", "nose", "ear"))
"""
SIZE = (32, 24)
WIDER = (33, 24)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with a victim of the user's own."""
    (tmp_path / "run_victim.py").write_text(VICTIM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "run_victim", raising=False)
    return tmp_path


@pytest.fixture
def photos(here):
    """Six photographs, two of them in a folder of their own."""
    cat = Image.fromarray(skimage.data.chelsea())
    (here / "photos" / "more").mkdir(parents=True)
    for k, name in enumerate(["a", "b", "c", "d", "more/a", "more/e"]):
        cat.crop((40 * k, 30 * k, 40 * k + 160, 30 * k + 120)).resize(SIZE).save(
            here / "photos" / f"{name}.png"
        )
    return here / "photos"


def start(*arguments, model="run_victim:make", out="out"):
    device = [] if "--device" in arguments else ["--device", "cpu"]
    return main(["run", "--model", model, "--out", out, *device, *map(str, arguments)])


def lines(out="out"):
    with open(f"{out}/images.jsonl") as file:
        return [json.loads(line) for line in file]


def summary(out="out"):
    with open(f"{out}/summary.json") as file:
        return json.load(file)


def pixels(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255


def refused(capsys, *arguments, **options):
    """The one line in which bad input ends."""
    assert start(*arguments, **options) == 2
    error = capsys.readouterr().err
    last = error.splitlines()[-1]
    assert last.startswith("dagcore run: error: ")
    return last


def test_a_folder_of_images_without_labels(photos, capsys):
    assert start("--data", "photos", "--perturbations", "--figures", 2) == 0
    output = capsys.readouterr()
    records = lines()
    assert [record["name"] for record in records] == ["a", "b", "c", "d", "more/a", "more/e"]
    assert [record["number"] for record in records] == list(range(6))
    for record in records:
        clean = pixels(photos / f"{record['name']}.png")
        perturbation = load_file(f"out/perturbations/{record['name']}.safetensors")["perturbation"]
        rounded = round_to_8_bits(clean + perturbation)
        assert torch.equal(pixels(f"out/images/{record['name']}.png"), rounded)
        assert record["perceptibility"] == pytest.approx(float(perceptibility(perturbation[None])))
        assert record["perceptibility_after_rounding"] == pytest.approx(
            float(perceptibility((rounded - clean)[None])), rel=1e-4
        )
        assert record["status"] == "converged"
        assert record["active"][-1] == 0
        assert len(record["active"]) == record["iterations"] + 1
        assert record["targets"] == SIZE[0] * SIZE[1]
    known = summary()
    assert (known["images"], known["attacked"], known["converged"]) == (6, 6, 6)
    assert known["mIoU"]["before"]["mean"] == 100  # against what the network sees
    assert known["mIoU"]["after"]["mean"] < 1
    assert known["iterations"]["largest"] == max(record["iterations"] for record in records)
    good = sum(record["active_after_rounding"] == 0 for record in records)
    assert known["success after rounding, %"] == pytest.approx(100 * good / 6)
    assert sorted(p.name for p in (photos.parent / "out" / "figures").iterdir()) == [
        "a.png",
        "d.png",
    ]
    assert output.err.count("images/s") == 6
    assert "mIoU" in output.out
    (speed,) = json.loads((photos.parent / "out" / "speed.json").read_text())
    assert speed["images"] == 6
    assert speed["images per second"] == pytest.approx(6 / speed["seconds"])
    left = {p.name for p in (photos.parent / "out").iterdir()}
    assert left == {
        ".lock",
        "figures",
        "images",
        "images.jsonl",
        "perturbations",
        "settings.toml",
        "speed.json",
        "summary.json",
    }


def test_an_image_gets_what_the_attack_alone_would_give(photos):
    assert start("--data", "photos", "--no-prepare") == 0
    command = ["attack", "photos/a.png", "--model", "run_victim:make", "--device", "cpu"]
    assert main([*command, "--out", "alone"]) == 0
    with open("alone/a.json") as file:
        alone = json.load(file)
    record = lines()[0]
    for name in ("active", "iterations", "targets", "perceptibility", "generator_seed"):
        assert record[name] == alone[name]
    with open("alone/a.png", "rb") as one, open("out/images/a.png", "rb") as other:
        assert one.read() == other.read()


def test_what_is_kept_is_what_was_attacked(photos, capsys):
    """On 256 levels; with none, a warning tells of files that fail."""
    common = ("--data", "photos", "--figures", 1)
    assert start(*common, "--epsilon", "12.4/255") == 0
    for record in lines():
        assert record["active"][-1] == record["active_after_rounding"]
        assert record["perceptibility"] == record["perceptibility_after_rounding"]
        name = record["name"]
        change = (pixels(f"out/images/{name}.png") - pixels(f"photos/{name}.png")) * 255
        assert 1 <= int(change.abs().max().round()) <= 12
    assert summary()["warnings"] == []
    assert "warning" not in capsys.readouterr().err
    assert start(*common, "--levels", "none", out="memory") == 0
    converged = [record for record in lines("memory") if record["status"] == "converged"]
    again = [record for record in converged if record["active_after_rounding"]]
    assert again
    (warning,) = summary("memory")["warnings"]
    assert warning.startswith(
        f"{len(again)} of {len(converged)} images that converged have active targets in their 8-bit"
    )
    assert warning.endswith("--levels 256 attacks what the files hold")
    assert capsys.readouterr().err.splitlines()[-1] == f"dagcore run: warning: {warning}"


def test_a_label_map_that_does_not_fit_is_recorded_wherever_it_comes(photos, capsys):
    for name in ("a", "b", "c"):
        size = (WIDER if name == "a" else SIZE)[::-1]
        levels = np.full(size, 9 if name == "b" else 1, dtype=np.uint8)
        Image.fromarray(levels).save(photos.parent / f"{name}.png")
    for path in photos.glob("[d]*"):
        path.unlink()
    (photos.parent / "maps").mkdir()
    for name in ("a", "b", "c"):
        (photos.parent / f"{name}.png").rename(photos.parent / "maps" / f"{name}.png")
    for path in (photos / "more").glob("*"):
        path.unlink()
    arguments = ("--data", "photos", "--labels", "maps", "--max-iter", 2, "--figures", 1)
    assert start(*arguments) == 0
    a, b, c = lines()
    assert "label map of a must have 32 x 24 pixels" in a["reason"]
    assert "label map of b must hold classes below 5" in b["reason"]
    assert c["status"] == "budget"


def test_warnings_are_lines(photos):
    """In a process of its own, where warnings are no errors."""
    run = [sys.executable, "-m", "dagcore", "run", "--data", "photos", "--out", "out"]
    run += ["--model", "run_victim:make", "--device", "cpu", "--epsilon", "0.001"]
    done = subprocess.run([*run, "--max-iter", "1"], capture_output=True, text=True, check=True)
    told = [line for line in done.stderr.splitlines() if "warning" in line.lower()]
    assert told == [
        "dagcore run: warning: epsilon=0.001 is less than the spacing of 256 levels in "
        "(0.0, 1.0): no image can change"
    ]
    done = subprocess.run(
        [*run[:-1], "1.6/255", "--levels", "none", "--max-iter", "1", "--out", "free"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "dagcore run: warning: --epsilon 0.00627451 is not a multiple of 1/255" in done.stderr


def test_scenes_and_their_scores(here):
    assert start("--data", "scenes", "--images", 3, "--max-iter", 15, model="FCN-Alex") == 0
    known = summary()
    assert known["mIoU"]["before"]["mean"] == pytest.approx(
        evaluate("FCN-Alex", count=3).mean, rel=1e-9
    )
    network = zoo.load("FCN-Alex")
    measure = MeanIoU(13)
    for example in Scenes("07", "test", count=3):
        image = pixels(f"out/images/{example.key}.png")
        with torch.no_grad():
            seen = dagcore.ops.argmax_bilinear(network(image[None]), example.mask.shape)[0]
        measure.update(seen, example.mask)
    assert known["mIoU"]["after"]["mean"] == pytest.approx(measure.compute().mean)
    assert known["mIoU"]["after"]["mean"] < known["mIoU"]["before"]["mean"]
    assert set(known["mIoU"]["before"]["classes"]) <= set(network.classes)


def test_a_detector_on_scenes(here):
    arguments = ("--images", 3, "--max-iter", 20, "--set", "12/val")
    assert start("--data", "scenes", *arguments, model="FR-ZF-07") == 0
    examples = list(Scenes("12", "val", count=3))
    clean = evaluate("FR-ZF-07", examples).mean
    assert summary()["mAP"]["before"]["mean"] == pytest.approx(clean, rel=1e-6)
    network, measure = zoo.load("FR-ZF-07"), AveragePrecision(13)
    for example in examples:
        with torch.no_grad():
            (found,) = network([pixels(f"out/images/{example.key}.png")])
        measure.update(found, example.boxes, example.labels, example.difficult)
    after = summary()["mAP"]["after"]["mean"]
    assert after == pytest.approx(measure.compute().mean, rel=1e-6)
    assert after <= clean
    for record, example in zip(lines(), examples, strict=True):
        assert record["name"] == example.key
        assert record["truth"]["boxes"] == example.boxes.tolist()


def coco_of(examples, folder):
    """Scenes as image files and a COCO annotation."""
    (folder / "pictures" / "sub").mkdir(parents=True)
    content = {"images": [], "annotations": [], "categories": []}
    names = zoo.load("FR-ZF-07").classes
    content["categories"] = [{"id": 10 * k, "name": name} for k, name in enumerate(names) if k]
    for n, example in enumerate(examples):
        name = f"sub/{example.key}.png"
        levels = (example.image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(levels).save(folder / "pictures" / name)
        height, width = levels.shape[:2]
        content["images"].append({"id": n, "file_name": name, "height": height, "width": width})
        for box, label, crowd in zip(
            example.boxes.tolist(), example.labels.tolist(), example.difficult.tolist(), strict=True
        ):
            left, top, right, bottom = box
            content["annotations"].append(
                {
                    "image_id": n,
                    "bbox": [left, top, right - left, bottom - top],
                    "category_id": 10 * label,
                    "iscrowd": int(crowd),
                }
            )
    (folder / "objects.json").write_text(json.dumps(content))


def test_boxes_in_cocos_format(here):
    coco_of(Scenes("07", "test", count=2), here)
    arguments = ("--max-iter", 5, "--no-prepare", "--labels", "objects.json")
    assert start("--data", "pictures", *arguments, model="FR-ZF-07") == 0
    known = summary()
    assert known["mAP"]["before"]["mean"] == pytest.approx(
        evaluate("FR-ZF-07", count=2).mean, rel=1e-6
    )
    same = ("--images", 2, "--max-iter", 5, "--no-prepare")
    assert start("--data", "scenes", *same, model="FR-ZF-07", out="scenes") == 0
    for one, other in zip(lines(), lines("scenes"), strict=True):
        assert one["active"] == other["active"]
        assert one["name"] == f"sub/{other['name']}"


def test_two_images_do_not_get_the_boxes_of_one(here, capsys):
    coco_of(Scenes("07", "test", count=1), here)
    (known,) = (here / "pictures" / "sub").iterdir()
    content = json.loads((here / "objects.json").read_text())
    content["images"][0]["file_name"] = "0.png"
    (here / "objects.json").write_text(json.dumps(content))
    for name in ("a", "b"):
        (here / "pictures" / name).mkdir()
        (here / "pictures" / name / "0.png").write_bytes(known.read_bytes())
    message = "tell a/0.png and b/0.png apart"
    options = ("--data", "pictures", "--labels", "objects.json")
    assert message in refused(capsys, *options, model="FR-ZF-07")


def test_voc(here):
    root = here / "VOCdevkit" / "VOC2007"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    cat = Image.fromarray(skimage.data.chelsea()).resize((64, 48))
    mask = np.zeros((48, 64), np.uint8)
    mask[10:30, 20:40] = 8
    mask[:4] = 255
    for name in ("000001", "000002"):
        cat.save(root / "JPEGImages" / f"{name}.jpg")
        Image.fromarray(mask).save(root / "SegmentationClass" / f"{name}.png")
    (root / "ImageSets" / "Segmentation" / "test.txt").write_text("000001\n000002\n")
    (here / "voc_victim.py").write_text(VICTIM.replace("Conv2d(3, 5,", "Conv2d(3, 21,"))
    text = (here / "voc_victim.py").read_text().replace("randn(5,", "randn(21,")
    names = "from dagcore.data import VOC_CLASSES\n"
    text = names + text.replace('("sky", "fur", "eye", "nose", "ear")', "VOC_CLASSES")
    (here / "voc_victim.py").write_text(text)
    assert start("--data", "VOCdevkit", "--max-iter", 3, model="voc_victim:make") == 0
    assert [record["name"] for record in lines()] == ["000001", "000002"]
    pixels_of = lines()[0]["pixels"]["before"]
    assert sum(true for _, _, true in pixels_of.values()) == 44 * 64
    assert pixels_of["8"][2] == 20 * 20


# What a folder of images may hold, and the reason that is put on record.
def break_image(photos):
    (photos / "b.png").write_bytes((photos / "b.png").read_bytes()[:200])


def break_text(photos):
    (photos / "b.png").write_text("not a picture")


def break_size(photos):
    Image.new("RGB", (1, 1)).save(photos / "b.png")


def break_depth(photos):
    Image.fromarray(np.zeros((24, 32), np.uint16)).save(photos / "b.png")


def break_label_size(photos):
    Image.new("L", (9, 9)).save(photos.parent / "maps" / "b.png")


def break_label_class(photos):
    Image.new("L", SIZE, 7).save(photos.parent / "maps" / "b.png")


def break_label_count(photos):
    Image.new("L", SIZE, 5).save(photos.parent / "maps" / "b.png")


def break_label_mode(photos):
    Image.new("RGB", SIZE).save(photos.parent / "maps" / "b.png")


def break_label_format(photos):
    Image.new("L", SIZE).save(photos.parent / "maps" / "b.png", format="JPEG")


def break_label_away(photos):
    (photos.parent / "maps" / "b.png").unlink()


BROKEN = [
    (break_image, "b.png cannot be read as an image"),
    (break_text, "b.png cannot be read as an image"),
    (break_size, "cannot take b (1 x 1 pixels)"),
    (break_depth, "b.png must have 8 bits per channel, got mode I;16"),
    (break_label_size, "label map of b must have 32 x 24 pixels (the size of the image)"),
    (break_label_class, "label map of b must hold classes below 5 (255 is ignored), got 7"),
    (break_label_count, "got 5 (are they numbered from 1?)"),
    (break_label_mode, "must be a palette or grey image whose values are classes, got mode RGB"),
    (break_label_format, "b.png must be of a lossless format such as PNG, got JPEG"),
    (break_label_away, "maps/b.png does not exist, but b.png needs it"),
]


def with_maps(photos):
    (photos.parent / "maps" / "more").mkdir(parents=True)
    for path in photos.rglob("*.png"):
        values = np.random.default_rng(0).integers(0, 5, SIZE[::-1], dtype=np.uint8)
        Image.fromarray(values).save(photos.parent / "maps" / path.relative_to(photos))


@pytest.mark.parametrize(("spoil", "reason"), BROKEN)
def test_what_is_broken_is_put_on_record_and_passed_over(photos, capsys, spoil, reason):
    with_maps(photos)
    spoil(photos)
    arguments = ("--data", "photos", "--labels", "maps", "--max-iter", 5, "--figures", 0)
    assert start(*arguments) == 0
    output = capsys.readouterr()
    broken = [record for record in lines() if record["status"] == "failed"]
    assert [record["name"] for record in broken] == ["b"]
    assert reason in broken[0]["reason"]
    assert summary()["failed"] == [
        {"number": 1, "name": "b", "reason": broken[0]["reason"]},
    ]
    assert summary()["attacked"] == 5
    assert "b: passed over" in output.err
    assert "1, with reasons in images.jsonl" in output.out
    assert not (photos.parent / "out" / "images" / "b.png").exists()
    assert reason in refused(capsys, *arguments, "--strict", out="strict")
    assert not (photos.parent / "strict" / "summary.json").exists()


def test_label_maps_of_16_bits_and_names_with_accents_in_two_ways(photos):
    with_maps(photos)
    maps = photos.parent / "maps"
    with Image.open(maps / "b.png") as image:
        labels = np.array(image).astype(np.uint16)
    labels[0], labels[1] = 255, 65535
    Image.fromarray(labels).save(maps / "cafe\u0301.png")
    (photos / "b.png").rename(photos / "caf\u00e9.png")
    assert start("--data", "photos", "--labels", "maps", "--max-iter", 0, "--figures", 0) == 0
    known = {record["name"]: record for record in lines()}
    assert summary()["failed"] == []
    assert known["caf\u00e9"]["targets"] == known["a"]["targets"] - 2 * SIZE[0]


def seen_as_labels(photos, change):
    """Label maps of what the victim sees, changed: name and classes -> classes."""
    import run_victim

    victim = run_victim.make()
    for path in photos.rglob("*.png"):
        with torch.no_grad():
            scores = victim(pixels(path)[None])
        seen = dagcore.ops.argmax_bilinear(scores, SIZE[::-1])[0].numpy()
        name = path.relative_to(photos)
        target = photos.parent / "maps" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(change(name.stem, seen).astype(np.uint8)).save(target)


SHIFTED = [(1, "1 less: are they numbered from 1?"), (-1, "1 more: does 0 stand for 1?")]


@pytest.mark.parametrize(("shift", "says"), SHIFTED)
def test_labels_that_do_not_fit_are_no_success(photos, capsys, shift, says):
    def change(_, seen):
        moved = seen + shift
        return np.where((moved >= 0) & (moved < 5), moved, 255)

    seen_as_labels(photos, change)
    arguments = ("--data", "photos", "--labels", "maps", "--figures", 0)
    assert start(*arguments) == 0
    known, error = summary(), capsys.readouterr().err
    assert known["targets correct when clean, %"] == 0
    assert (known["nothing to fool"], known["converged"]) == (6, 0)
    assert known["success after rounding, %"] is None
    assert known["perceptibility"] is None
    assert error.splitlines()[-1] == f"dagcore run: warning: {known['warnings'][0]}"
    assert known["warnings"][0].startswith(
        "only 0.0 % of the labelled targets are correct on the clean"
    )
    assert known["warnings"][0].endswith(f" 100.0 % would be correct if every label were {says}")
    image = ["attack", "photos/a.png", "--labels", "maps/a.png", "--model", "run_victim:make"]
    assert main([*image, "--out", "alone"]) == 0
    output = capsys.readouterr()
    assert says in output.err.splitlines()[-1]
    assert "nothing to fool" in output.out


def test_success_is_told_of_what_was_correct_before(photos, capsys):
    def change(name, seen):
        wrong = (seen + 2) % 5
        if name != "b":  # half of each other image is labelled rightly
            wrong[:12] = seen[:12]
        return wrong

    seen_as_labels(photos, change)
    arguments = ("--data", "photos", "--labels", "maps", "--figures", 0)
    assert start(*arguments, "--max-iter", 1) == 0
    known, records = summary(), lines()
    half = SIZE[0] * SIZE[1] // 2
    assert [r["correct_before"] for r in records] == [half, 0, half, half, half, half]
    assert all(r["active"][0] == r["correct_before"] for r in records)
    assert known["nothing to fool"] == 1
    assert known["targets correct when clean, %"] == pytest.approx(100 * 5 / 12)
    left = [r["active"][-1] / half for r in records if r["correct_before"]]
    assert known["active targets left, %"] == pytest.approx(100 * sum(left) / 5)
    assert known["warnings"] == []
    assert start(*arguments, out="whole") == 0
    good = sum(r["active_after_rounding"] == 0 for r in lines("whole") if r["correct_before"])
    assert summary("whole")["success after rounding, %"] == pytest.approx(100 * good / 5)
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("goal", "right", "active", "left", "tolerance", "expected"),
    [
        ("leave", 10, 10, 0, 0.0, 100),
        ("leave", 10, 10, 2, 0.2, 100),  # of the ten that were right, not of all 100
        ("leave", 10, 10, 3, 0.2, 0),
        ("leave", 0, 0, 0, 0.2, None),
        ("reach", 0, 50, 0, 0.0, 100),  # what was wrong before is to be led as well
        ("reach", 90, 0, 0, 0.0, None),  # all are where they are wanted
    ],
)
def test_success_with_a_tolerance(goal, right, active, left, tolerance, expected):
    record = {
        "status": "converged",
        "targets": 100,
        "correct_before": right,
        "to_fool": active,
        "left": left,
        "active_after_rounding": left,
        "pixels": {"before": {}, "after": {}},
        "num_classes": 2,
        "perceptibility": 0.0,
        "perceptibility_after_rounding": 0.0,
        "iterations": 1,
        "notes": [],
    }
    known = summarise([record], None, tolerance)
    assert known["success after rounding, %"] == expected


def test_other_formats_are_read_or_named(photos, capsys):
    with Image.open(photos / "a.png") as image:
        image.save(photos / "f.gif", save_all=True, append_images=[image.rotate(90)])
        image.save(photos / "g.PPM")
        image.save(photos / "h.jfif", format="JPEG")
        image.save(photos / "i.jp2")
    (photos / "more" / "notes.txt").write_text("no image")
    (photos / ".hidden.txt").write_text("no image")
    assert start("--data", "photos", "--max-iter", 0, "--figures", 0) == 0
    output = capsys.readouterr()
    assert "note: --data photos: passed over 2 files of other formats than BMP, GIF" in output.err
    assert ": i.jp2, more/notes.txt\n" in output.err
    notes = {record["name"]: record["notes"] for record in lines()}
    assert set(notes) == {"a", "b", "c", "d", "f", "g", "h", "more/a", "more/e"}
    assert notes["f"] == ["the first of its 2 frames"]
    assert not any(notes[name] for name in notes if name != "f")
    assert "(the first of its 2 frames)" in output.err
    assert summary()["images with notes"] == 1
    arguments = ["attack", "photos/f.gif", "--model", "run_victim:make", "--out", "alone"]
    assert main([*arguments, "--max-iter", "0"]) == 0
    assert "f: (the first of its 2 frames)\n" in capsys.readouterr().err


def test_nothing_but_broken_images_is_an_error(photos, capsys):
    for path in photos.rglob("*.png"):
        path.write_text("no picture")
    assert "no image could be attacked: a: " in refused(capsys, "--data", "photos")
    assert len(summary()["failed"]) == 6


BAD = [
    (("--data", "nowhere"), "--data must be scenes or a folder, got nowhere"),
    (("--data", "empty"), "--data empty must hold images"),
    (("--data", "photos", "--set", "07/test"), "--set requires scenes or VOC"),
    (("--data", "scenes", "--set", "08/test"), "--set must be one of 07, 12 / one of train"),
    (("--data", "scenes", "--set", "test"), "--set must be FAMILY/SPLIT"),
    (("--data", "scenes", "--labels", "photos"), "--labels requires a folder of images"),
    (("--data", "photos", "--labels", "nowhere"), "--labels nowhere does not exist"),
    (("--data", "photos", "--labels", "photos/a.png"), "--labels must be a folder with NAME.png"),
    (("--data", "scenes"), "--model must have the classes of --data"),
    (("--data", "photos", "--gamma", "x"), "gamma must be a number or a fraction like 0.5/255"),
    (("--data", "photos", "--gamma", "-1"), "gamma must be a finite number above 0"),
    (("--data", "photos", "--tolerance", "2"), "tolerance must be a fraction in [0, 1)"),
    (("--data", "photos", "--images", "0"), "images must be at least 1, got 0"),
    (("--data", "photos", "--slots", "0"), "slots must be at least 1, got 0"),
    (("--data", "photos", "--figures", "-1"), "figures must be at least 0"),
    (("--data", "photos", "--adversarial", "circle", "--goal", "leave"), "--goal must be reach"),
    (("--data", "photos", "--device", "cuda:99"), "--device cuda:99 is not available"),
    ((), "data must be given"),
    (("--config", "none.toml"), "none.toml does not exist"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_settings_end_in_one_line_before_any_work(photos, capsys, arguments, message):
    (photos.parent / "empty").mkdir()
    assert message in refused(capsys, *arguments)
    assert not (photos.parent / "out").exists()


def test_rules_that_do_not_go_with_the_network_are_told_before_any_work(photos, capsys):
    break_text(photos)
    (photos / "a.png").write_text("no picture either")
    assert "--adversarial must be" in refused(capsys, "--data", "photos", "--adversarial", "paw")
    arguments = ("--data", "photos", "--adversarial", "circle", "--foreground", "paw")
    assert "'paw'" in refused(capsys, *arguments)
    assert not (photos.parent / "out").exists()


def test_a_repaired_image_is_attacked_when_the_run_is_started_again(photos):
    assert start("--data", "photos") == 0
    good = (photos / "b.png").read_bytes()
    (photos / "b.png").write_bytes(b"x" * len(good))
    assert start("--data", "photos", out="later") == 0
    assert summary("later")["attacked"] == 5
    before = {p: p.stat().st_mtime_ns for p in Path("later/images").rglob("*.png")}
    (photos / "b.png").write_bytes(good)
    assert start("--data", "photos", out="later") == 0
    assert summary("later")["attacked"] == 6
    assert Path("later/images.jsonl").read_bytes() == Path("out/images.jsonl").read_bytes()
    assert Path("later/summary.json").read_bytes() == Path("out/summary.json").read_bytes()
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_lines_that_were_taken_away_are_made_again(photos):
    assert start("--data", "photos") == 0
    whole = Path("out/images.jsonl").read_text()
    Path("out/images.jsonl").write_text("".join(whole.splitlines(keepends=True)[1:]))
    before = {p: p.stat().st_mtime_ns for p in Path("out/images").rglob("*.png")}
    assert start("--data", "photos") == 0
    assert Path("out/images.jsonl").read_text() == whole
    changed = [p.name for p, when in before.items() if p.stat().st_mtime_ns != when]
    assert changed == ["a.png"]
    Path("out/images.jsonl").write_text("")
    assert start("--data", "photos") == 0
    assert Path("out/images.jsonl").read_text() == whole


HUNGRY = """
import torch
from torch import nn

class Hungry(nn.Module):
    def forward(self, images):
        raise torch.OutOfMemoryError("no memory left")

make = Hungry
"""


def test_want_of_memory_is_no_fault_of_the_image(photos, capsys):
    Path("hungry_victim.py").write_text(HUNGRY)
    options = ("--data", "photos", "--images", 2)
    message = refused(capsys, *options, model="hungry_victim:make", out="other")
    assert "failed with OutOfMemoryError: no memory left, at one of a" in message
    assert not Path("other").exists()


FAILING = """
import torch
from torch import nn
from dagcore.victims import Victim

class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 5, 1)

    def forward(self, x):
        if x.requires_grad and float(x.detach().mean()) > 0.0:
            raise KeyError("a bug of the user's")
        return self.layer(x)

def make():
    return Victim(Failing())

class Later(Failing):
    def forward(self, x):
        if x.requires_grad:
            self.attacked = True
        elif hasattr(self, "attacked"):
            raise AttributeError("another bug")
        return self.layer(x)

    def __deepcopy__(self, memo):
        return self

def later():
    return Victim(Later())

class Alone(Failing):
    def __deepcopy__(self, memo):
        raise RuntimeError("there is one of me only")

def alone():
    return Victim(Alone())

def nan():
    net = nn.Conv2d(3, 5, 1)
    net.weight.data.fill_(float("nan"))
    return Victim(net)
"""


def test_a_model_that_fails_in_an_attack(photos, capsys):
    Path("failing_victim.py").write_text(FAILING)
    message = refused(capsys, "--data", "photos", "--no-prepare", model="failing_victim:make")
    assert "--model failing_victim:make failed with KeyError: " in message
    assert "at one of a" in message
    arguments = ("--data", "photos", "--no-prepare")
    message = refused(capsys, *arguments, model="failing_victim:later", out="later")
    assert "failed with AttributeError: another bug, at one of a" in message
    message = refused(capsys, "--data", "photos", model="failing_victim:alone", out="alone")
    assert "cannot be prepared (there is one of me only): --no-prepare attacks it" in message
    message = refused(capsys, *arguments, model="failing_victim:nan", out="nan")
    assert "no image could be attacked" in message
    assert "must return finite scores, but does not for a" in message


def test_names_that_are_too_long_are_put_on_record(photos):
    name = "x" * 250
    Image.open(photos / "a.png").save(photos / f"{name}.bmp", format="PNG")
    assert start("--data", "photos", "--max-iter", 1) == 0
    (broken,) = summary()["failed"]
    assert broken["name"] == name
    assert "an image's name must have at most" in broken["reason"]
    assert summary()["attacked"] == 6


def test_an_image_in_the_place_of_a_folder_is_refused(photos, capsys):
    (photos / "a.png").unlink()
    Image.new("RGB", SIZE).save(photos / "a.bmp")
    (photos / "a.png").mkdir()
    Image.new("RGB", SIZE).save(photos / "a.png" / "x.png")
    message = refused(capsys, "--data", "photos")
    assert "a.bmp would be written to a.png, where a.png/x.png needs a folder" in message


def test_a_folder_with_a_settings_file_of_something_else_is_left_alone(photos, capsys):
    Path("out/sub").mkdir(parents=True)
    Path("out/settings.toml").write_text('title = "x"\n')
    Path("out/.12-0123456789abcdef.part").write_text("theirs")
    assert "--out must be a new folder or that of a run" in refused(capsys, "--data", "photos")
    left = sorted(p.name for p in Path("out").iterdir())
    assert left == [".12-0123456789abcdef.part", "settings.toml", "sub"]


def test_images_that_have_changed_are_refused(photos, capsys):
    assert start("--data", "photos") == 0
    Image.new("RGB", SIZE).save(photos / "c.png")
    assert "names and sizes of the images was " in refused(capsys, "--data", "photos")
    with_maps(photos)
    assert start("--data", "photos", "--labels", "maps", out="labelled") == 0
    Image.new("L", SIZE).save("maps/c.png")
    message = refused(capsys, "--data", "photos", "--labels", "maps", out="labelled")
    assert "names and sizes of the images was " in message


def test_two_images_of_one_name_are_refused(photos, capsys):
    Image.open(photos / "a.png").save(photos / "a.bmp")
    assert "a.bmp and a.png would both be written to a.png" in refused(capsys, "--data", "photos")


def test_results_among_the_data_are_refused(photos, capsys):
    message = refused(capsys, "--data", "photos", out="photos/out")
    assert "--out must not lie in the folder of --data photos" in message


def test_hidden_files_are_no_images(photos):
    Image.open(photos / "a.png").save(photos / ".123-a.png")
    assert start("--data", "photos", "--max-iter", 1) == 0
    assert len(lines()) == 6


def test_a_name_cannot_lead_out_of_the_folder(tmp_path):
    folder = results.Folder(tmp_path / "out", results.NUMBERS)
    for name in ("../x", "a/../../x", "/x", ".."):
        with pytest.raises(ValueError, match="must stay below its folder"):
            folder.path("images", name, "png")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "away").mkdir()
    (tmp_path / "out" / "images").mkdir(parents=True)
    (tmp_path / "out" / "images" / "link").symlink_to(tmp_path / "away")
    with pytest.raises(ValueError, match="must stay below its folder"):
        folder.path("images", "link/x", "png")


def test_a_config_file_and_what_is_kept_of_it(photos, capsys):
    (photos.parent / "run.toml").write_text(
        'data = "photos"\nmodel = "run_victim:make"\ngamma = "1/255"\nmax_iter = 7\n'
        'epsilon = 0.1\nimages = 2\nout = "out"\nfigures = 0\n'
    )
    assert main(["run", "--config", "run.toml", "--max-iter", "5", "--device", "cpu"]) == 0
    kept = tomllib.loads((photos.parent / "out" / "settings.toml").read_text())
    assert kept.pop("made_with")["images"] == 2
    assert kept.pop("versions")["torch"] == str(torch.__version__)
    assert kept == {
        "data": "photos",
        "model": "run_victim:make",
        "attack": "dag",
        "adversarial": "permutation",
        "gamma": 1 / 255,
        "max_iter": 5,
        "epsilon": 0.1,
        "tolerance": 0.0,
        "margin": 0.0,
        "levels": "256",
        "device": "cpu",
        "seed": 0,
        "images": 2,
        "figures": 0,
        "prepare": True,
        "perturbations": False,
        "strict": False,
    }
    # What is kept makes the same run again.
    assert main(["run", "--config", "out/settings.toml", "--out", "again"]) == 0
    assert (photos.parent / "again" / "images.jsonl").read_bytes() == (
        photos.parent / "out" / "images.jsonl"
    ).read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('datta = "photos"', "'datta' is not a setting: did you mean data?"),
        ("xyz = 1", "'xyz' is not a setting; use one of"),
        ('max_iter = "many"', "max_iter must be an integer, got 'many'"),
        ("max_iter = true", "max_iter must be an integer, got True"),
        ("strict = 1", "strict must be true or false, got 1"),
        ("data = 3", "data must be text, got 3"),
        ("gamma = []", "gamma must be a number, got []"),
        ('goal = "flee"', "goal must be 'leave' or 'reach', got 'flee'"),
        ("data = ", "cannot be read as TOML"),
    ],
)
def test_bad_config_files(photos, capsys, text, message):
    (photos.parent / "run.toml").write_text(text)
    arguments = [] if text.startswith("data") else ["--data", "photos"]
    assert message in refused(capsys, "--config", "run.toml", *arguments)
    assert not (photos.parent / "out").exists()


def test_toml_that_is_written_is_read_back():
    values = {"a": 'quo"te\\ \n\t \x7f ü 漢', "b": 0.1, "c": True, "d": -3, "e": 1e-9}
    text = run_settings.to_toml(values, {"versions": {"cuda of torch": "13.0"}})
    read = tomllib.loads(text)
    assert read.pop("versions") == {"cuda of torch": "13.0"}
    assert read == values


def test_a_finished_run_is_not_done_again(photos, capsys, monkeypatch):
    assert start("--data", "photos") == 0
    before = {p: p.stat().st_mtime_ns for p in (photos.parent / "out" / "images").rglob("*.png")}
    shown = capsys.readouterr().out
    assert start("--data", "photos") == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    again = capsys.readouterr().out
    assert [line for line in shown.splitlines() if "images/s" not in line] == again.splitlines()


def test_other_settings_are_refused_with_what_differs(photos, capsys):
    assert start("--data", "photos", "--images", 2) == 0
    message = refused(capsys, "--data", "photos", "--images", 3, "--epsilon", "0.1", "--seed", 4)
    assert "results of other settings: " in message
    assert "seed was 0 and is 4" in message
    assert "images was 2 and is 3" in message
    assert "epsilon was not set and is 0.1" in message
    assert "names and sizes of the images was " in message
    assert start("--data", "photos/", "--images", 2, "--strict", "--figures", 1) == 0  # no other
    text = (
        (photos.parent / "run_victim.py").read_text().replace("manual_seed(0)", "manual_seed(11)")
    )
    (photos.parent / "run_victim.py").write_text(text)
    del sys.modules["run_victim"]
    assert "digest of the weights was" in refused(capsys, "--data", "photos", "--images", 2)


def test_other_versions_are_told(photos, capsys):
    assert start("--data", "photos", "--images", 1) == 0
    kept = photos.parent / "out" / "settings.toml"
    kept.write_text(kept.read_text().replace(str(torch.__version__), "1.0"))
    assert start("--data", "photos", "--images", 1) == 0
    assert "note: torch was '1.0' and is" in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused(photos, capsys):
    (photos.parent / "out").mkdir()
    (photos.parent / "out" / "thesis.tex").write_text("x")
    message = refused(capsys, "--data", "photos")
    assert "--out must be a new folder or that of a run, out has thesis.tex" in message
    assert [p.name for p in (photos.parent / "out").iterdir()] == ["thesis.tex"]


def test_a_record_that_cannot_be_read(photos, capsys):
    assert start("--data", "photos", "--images", 1) == 0
    cut = {"number": 0, "name": "a", "status": "converged"}
    beyond = {"number": 5, "name": "a", "status": "failed", "reason": "none"}
    for text in ("{", "{}", "3", '{"number": []}', json.dumps(cut), json.dumps(beyond)):
        (photos.parent / "out" / "images.jsonl").write_text(text)
        message = refused(capsys, "--data", "photos", "--images", 1)
        assert "out/images.jsonl cannot be read as records of a run" in message


def test_slots_change_rounding_only(photos):
    assert start("--data", "photos") == 0
    assert start("--data", "photos", "--slots", 4, out="four") == 0
    for one, other in zip(lines(), lines("four"), strict=True):
        assert one["name"] == other["name"]
        assert one["status"] == other["status"]
        assert one["perceptibility"] == pytest.approx(other["perceptibility"], rel=0.05)


def test_progress_on_a_terminal(photos):
    """Under a pseudo-terminal there are bars, with what was passed over above them."""
    (photos / "b.png").write_text("no picture")
    code = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"
    command = [sys.executable, "-m", "dagcore", "run", "--data", "photos"]
    command += ["--model", "run_victim:make", "--out", "out"]
    root = os.path.dirname(os.path.dirname(dagcore.__file__))
    path = os.pathsep.join([root, str(photos.parent)])
    done = subprocess.run(
        [sys.executable, "-c", code, *command],
        env={**os.environ, "PYTHONPATH": path, "TERM": "xterm-256color", "COLUMNS": "140"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout
    assert "b: passed over" in done.stdout
    assert "6/6" in done.stdout
    assert "images/s" in done.stdout
    assert "targets active" in done.stdout


def test_every_row_of_the_table_of_bad_input_is_a_test():
    tests = Path(__file__).parent
    page = (tests.parent / "docs" / "command-line.md").read_text()
    rows = re.findall(r"^\| .+? \| (?:recorded|error): `(.+?)`", page, re.MULTILINE)
    assert len(rows) >= 20
    code = "".join((tests / name).read_text() for name in ("test_run.py", "test_run_killed.py"))
    assert [row for row in rows if row not in code] == []


COUNTED = """
from dagcore import zoo

def make():
    victim = zoo.load("{name}")
    inside = victim if hasattr(victim, "network") else victim.backbone
    inside.register_forward_hook(count)
    return victim

def count(module, arguments, output):
    with open("calls", "a") as file:
        file.write("x" * len(arguments[0]))
"""


@pytest.mark.parametrize("name", ["FCN-Alex", "FR-ZF-07"])
@pytest.mark.parametrize("prepare", ["--prepare", "--no-prepare"])
def test_a_run_sees_each_image_twice(here, name, prepare):
    """Once clean, for labels, score and the attack's first look, and once as it is written."""
    count = 50 if name == "FCN-Alex" and prepare == "--prepare" else 4
    Path("counted_victim.py").write_text(COUNTED.format(name=name))
    options = ("--images", count, "--max-iter", 0, "--figures", 0, prepare)
    from dagcore.data import SCENE_CLASSES  # the network's own

    assert start("--data", "scenes", *options, model="counted_victim:make") == 0
    assert len(SCENE_CLASSES) == lines()[0]["num_classes"]
    assert len(lines()) == count
    assert len(Path("calls").read_text()) <= 2 * count
