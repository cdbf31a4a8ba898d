"""`dagcore attack` on detectors, with true boxes from files and without."""

import json
import re

import pytest
import torch
from command_line import attack, check_outputs, pixels, record, refused
from PIL import Image
from torchvision.models import detection

from dagcore import zoo
from dagcore.__main__ import main
from dagcore.data import SCENE_CLASSES, Scenes

NAME = "FR-ZF-07"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two scenes as files, with their boxes as VOC and COCO write them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "xml").mkdir()
    images, annotations = [], []
    for k, scene in enumerate(Scenes("07", "test", count=2, first=2)):
        levels = (scene.image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(levels).save(f"scene{k}.png")
        things = ""
        for box, label in zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True):
            left, top, right, bottom = map(int, box)
            things += (
                f"<object><name>{SCENE_CLASSES[label]}</name><difficult>0</difficult><bndbox>"
                f"<xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax>"
                f"<ymax>{bottom}</ymax></bndbox></object>"
            )
            annotations.append(
                {
                    "image_id": k,
                    "category_id": 100 + label,
                    "bbox": [left, top, right - left, bottom - top],
                    "iscrowd": 0,
                }
            )
        (tmp_path / f"xml/scene{k}.xml").write_text(f"<annotation>{things}</annotation>")
        images.append({"id": k, "file_name": f"scene{k}.png"})
    categories = [{"id": 100 + k, "name": name} for k, name in enumerate(SCENE_CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "coco.json").write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize("labels", ["xml", "coco.json"])
def test_true_boxes_from_files(folder, labels):
    images = ["scene0.png", "scene1.png"]
    options = ("--labels", labels, "--max-iter", 2, "--gamma", "2/255")
    assert attack(*options, model=NAME, image=images) == 0
    victim = zoo.load(NAME)
    for k, scene in enumerate(Scenes("07", "test", count=2, first=2)):
        numbers = record(f"scene{k}")
        assert numbers["labels"].endswith(("xml", "json"))
        assert numbers["proposals"] > 500
        assert numbers["num_classes"] == 13
        assert 10 < numbers["targets"] < numbers["proposals"]
        assert numbers["active"][0] > numbers["active"][-1]
        assert numbers["iterations"] == 2
        with torch.no_grad():
            before, after = (
                victim([image])[0]["scores"].tolist()
                for image in (
                    scene.image,
                    pixels(f"out/scene{k}.png"),
                )
            )
        assert numbers["detections"]["scores"] == pytest.approx(before, abs=1e-4)
        assert numbers["attacked"]["scores"] == pytest.approx(after, abs=1e-4)


def test_crowds_are_no_targets(folder):
    content = json.loads((folder / "coco.json").read_text())
    options = ("--max-iter", 0)
    assert attack("--labels", "coco.json", *options, model=NAME, image="scene0.png") == 0
    single = record("scene0")
    crowd = {"image_id": 0, "category_id": 102, "bbox": [0, 0, 160, 128], "iscrowd": "1"}
    content["annotations"].append(crowd)
    (folder / "crowd.json").write_text(json.dumps(content))
    labels = ("--labels", "crowd.json")
    assert attack(*labels, *options, model=NAME, image="scene0.png", out="crowd") == 0
    assert record("scene0", "crowd")["targets"] == single["targets"] > 0
    crowds = [{**one, "iscrowd": 1} for one in content["annotations"]]
    (folder / "crowd.json").write_text(json.dumps({**content, "annotations": crowds}))
    assert attack(*labels, *options, model=NAME, image="scene0.png", out="crowds") == 0
    assert record("scene0", "crowds")["targets"] == 0
    pictures = ("--data", "pictures", "--out", "run", "--device", "cpu", "--max-iter", "0")
    (folder / "pictures").mkdir()
    (folder / "scene0.png").rename(folder / "pictures" / "scene0.png")
    assert main(["run", "--model", NAME, *labels, *pictures]) == 0
    kept = json.loads((folder / "run" / "images.jsonl").read_text())
    assert kept["truth"]["iscrowd"] == [True] * len(kept["truth"]["boxes"])
    assert (
        json.loads((folder / "run" / "summary.json").read_text())["mAP"]["before"]["mean"] is None
    )


def test_objects_of_unknown_classes_are_left_out_and_named(folder, capsys):
    path = folder / "xml" / "scene0.xml"
    known = path.read_text()
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    more = f"<object><name>unicorn</name>{box}</object></annotation>"
    path.write_text(known.replace("</annotation>", more))
    assert attack("--labels", "xml", "--max-iter", 0, model=NAME, image="scene0.png") == 0
    note = "without objects of unknown classes (unicorn)"
    assert record("scene0")["notes"] == [note]
    assert f"scene0: ({note})\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("target", "warning: 2 of 2 images with labelled objects have no target"),
        ("window", "warning: only 0.0 % of the labelled targets are correct on the clean images"),
    ],
)
def test_labels_of_other_classes_are_told(folder, capsys, name, says):
    for path in (folder / "xml").iterdir():
        path.write_text(re.sub("<name>.*?</name>", f"<name>{name}</name>", path.read_text()))
    images = ["scene0.png", "scene1.png"]
    assert attack("--labels", "xml", "--max-iter", 0, model=NAME, image=images) == 0
    assert says in capsys.readouterr().err
    assert attack("--labels", "coco.json", "--max-iter", 0, model=NAME, image=images) == 0
    assert "warning" not in capsys.readouterr().err
    for name in ("scene0", "scene1"):
        assert 0 < record(name)["correct_before"] == record(name)["active"][0]


def test_images_of_one_name_in_two_folders(folder):
    content = json.loads((folder / "coco.json").read_text())
    for k in range(2):
        (folder / f"part{k}").mkdir()
        (folder / f"scene{k}.png").rename(folder / f"part{k}/0.png")
        content["images"][k]["file_name"] = f"part{k}/0.png"
    (folder / "coco.json").write_text(json.dumps(content))
    for k, scene in enumerate(Scenes("07", "test", count=2, first=2)):
        image = str(folder / f"part{k}/0.png")
        options = ("--labels", "coco.json", "--max-iter", 0)
        assert attack(*options, model=NAME, image=image, out=f"out{k}") == 0
        assert record("0", f"out{k}")["objects"] == len(scene.boxes)
        assert record("0", f"out{k}")["correct_before"] > 10


def test_the_detectors_own_boxes(folder, capsys):
    assert attack("--adversarial", "vanish", "--max-iter", 60, model=NAME, image="scene1.png") == 0
    numbers = check_outputs(folder / "out", "scene1", pixels("scene1.png"))
    assert numbers["labels"] == "prediction"
    assert numbers["status"] == "converged"
    assert numbers["targets"] > 10
    sure = [
        sum(score > 0.3 for score in numbers[when]["scores"]) for when in ("detections", "attacked")
    ]
    assert sure[0] > sure[1]


@pytest.mark.parametrize(("adversarial", "number"), [("star", 5), ("5", 5), ("runner-up", None)])
def test_one_class_or_the_runner_up(folder, adversarial, number):
    options = ("--adversarial", adversarial, "--max-iter", 1)
    assert attack(*options, model=NAME, image="scene1.png") == 0
    found = record("scene1").get("class")
    assert found == (
        None if number is None else SCENE_CLASSES.index("star") if adversarial == "star" else number
    )


def test_an_image_without_objects_is_left_alone(folder, capsys):
    Image.new("RGB", (160, 128), "grey").save("empty.png")
    (folder / "xml/empty.xml").write_text("<annotation></annotation>")
    assert attack("--labels", "xml", model=NAME, image="empty.png") == 0
    assert "no targets" in capsys.readouterr().out
    numbers = record("empty")
    assert (numbers["targets"], numbers["iterations"]) == (0, 0)
    assert torch.equal(pixels("out/empty.png"), pixels("empty.png"))


@pytest.mark.parametrize(
    "name", ["fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large"]
)
def test_torchvisions_detectors_with_weights_from_a_file(folder, name):
    torch.manual_seed(0)
    make = getattr(detection, name)
    network = make(weights=None, weights_backbone=None, num_classes=7)
    torch.save(network.state_dict(), "weights.pth")
    done = attack("--weights", "weights.pth", "--max-iter", 1, model=name, image="scene0.png")
    assert done == 0
    assert record("scene0")["num_classes"] == 7


def test_a_detector_of_the_users_own(folder, monkeypatch):
    (folder / "own_detector.py").write_text(
        "from dagcore import zoo\ndef make():\n    return zoo.load('FR-ZF-07')\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    assert attack("--max-iter", 1, model="own_detector:make", image="scene0.png") == 0
    assert record("scene0")["targets"] > 0


BAD = [
    (("--labels", "nothing"), "--labels"),
    (("--adversarial", "circle"), "--adversarial circle requires a segmentation network"),
    (("--foreground", "5"), "--foreground requires a pattern"),
    (("--adversarial", "unicorn"), "--adversarial must be permutation, random, vanish, runner-up"),
    (("--labels", "empty"), "scene0.xml does not exist"),
    (("--labels", "bad.json"), "cannot be read as COCO's"),
    (("--labels", "unknown.json"), "has no image 'scene0.png'"),
    (("--labels", "unicorn.json"), "must have categories of the model's classes"),
    (("--labels", "box.json"), "scene0.png must be [left, top, width >= 0, height >= 0], got [1]"),
    (("--labels", "negative.json"), "width >= 0, height >= 0], got [5, 5, -3, 4]"),
    (("--labels", "size.json"), "must match the image scene0.png (160 x 128 pixels), it has 320"),
    (("--labels", "inverted.xml"), "a box must have xmin <= xmax and ymin <= ymax, got ['1', '1'"),
    (("--labels", "unicorn.xml"), "an object's name must be one of"),
    (("--labels", "twice.json"), "file_name and id, got 'scene0.png' and './scene0.png' (id 7)"),
    (("--labels", "ids.json"), "unique file_name and id, got 0 and 'scene7.png' (id 0)"),
    (("--labels", "astray.json"), "image_id 'x' is not the id of an image"),
    (("--labels", "flag.json"), "iscrowd of an object of scene0.png must be 0 or 1, got 'maybe'"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input(folder, capsys, options, message):
    content = json.loads((folder / "coco.json").read_text())
    (folder / "empty").mkdir()
    (folder / "bad.json").write_text("{")
    (folder / "unknown.json").write_text(json.dumps({**content, "images": [], "annotations": []}))
    broken = [{"image_id": 0, "category_id": 101, "bbox": [1]}]
    (folder / "box.json").write_text(json.dumps({**content, "annotations": broken}))
    broken = [{"image_id": 0, "category_id": 101, "bbox": [5, 5, -3, 4]}]
    (folder / "negative.json").write_text(json.dumps({**content, "annotations": broken}))
    larger = [{**one, "width": 320, "height": 256} for one in content["images"]]
    (folder / "size.json").write_text(json.dumps({**content, "images": larger}))
    names = [{**one, "name": "unicorn"} for one in content["categories"]]
    (folder / "unicorn.json").write_text(json.dumps({**content, "categories": names}))
    good = (folder / "xml/scene0.xml").read_text()
    thing = "<object><name>{}</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>{}</xmax>"
    thing += "<ymax>9</ymax></bndbox></object></annotation>"
    (folder / "inverted.xml").write_text(
        good.replace("</annotation>", thing.format(SCENE_CLASSES[1], 0))
    )
    (folder / "unicorn.xml").write_text("<annotation>" + thing.format("unicorn", 9))
    for name, image in (
        ("twice", {"id": 7, "file_name": "./scene0.png"}),
        ("ids", {"id": 0, "file_name": "scene7.png"}),
    ):
        images = [*content["images"], image]
        (folder / f"{name}.json").write_text(json.dumps({**content, "images": images}))
    for name, change in (("astray", {"image_id": "x"}), ("flag", {"iscrowd": "maybe"})):
        things = [*content["annotations"], {**content["annotations"][0], **change}]
        (folder / f"{name}.json").write_text(json.dumps({**content, "annotations": things}))
    error = refused(capsys, *options, model=NAME, image="scene0.png")
    assert message in error
    assert not (folder / "out").exists()


def test_a_file_for_one_image_and_two_images(folder, capsys):
    error = refused(
        capsys, "--labels", "xml/scene0.xml", model=NAME, image=["scene0.png", "scene1.png"]
    )
    assert "--labels must be a folder with NAME.xml for each of 2 images" in error


def test_all_labels_are_checked_before_the_first_attack(folder, capsys):
    content = json.loads((folder / "coco.json").read_text())
    things = [
        {**one, "bbox": [5, 5, -1, 4]} if one["image_id"] == 1 else one
        for one in content["annotations"]
    ]
    (folder / "second.json").write_text(json.dumps({**content, "annotations": things}))
    images = ["scene0.png", "scene1.png"]
    error = refused(capsys, "--labels", "second.json", model=NAME, image=images)
    assert "a bbox of scene1.png" in error
    assert not (folder / "out").exists()
