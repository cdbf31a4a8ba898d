"""Boxes from COCO's files as tools write them."""

import json
import unicodedata

import pytest

from dagcore.data.coco import CocoBoxes


def coco(path, names, objects, **changes):
    """An annotation file with images of 40 x 30 pixels, and objects (image_id, left edge)."""
    content = {
        "images": [
            {"id": k, "file_name": name, "width": 40, "height": 30} | changes
            for k, name in enumerate(names)
        ],
        "annotations": [
            {"image_id": image, "category_id": 3, "bbox": [left, 0, 5, 5]}
            for image, left in objects
        ],
        "categories": [{"id": 3, "name": "cat"}],
    }
    path = path / "coco.json"
    path.write_text(json.dumps(content))
    return CocoBoxes(path)


def left(boxes, name):
    return boxes(name, (30, 40))[0][:, 0].tolist()


def test_numbers_as_text_are_understood(tmp_path):
    objects = [("1", 7), (0, "2"), (1.0, 9)]
    boxes = coco(tmp_path, ["a.png", "b.png"], objects, width="40", height=30.0)
    assert [left(boxes, name) for name in ("a.png", "b.png")] == [[2], [7, 9]]
    with pytest.raises(ValueError, match=r"\(41 x 30 pixels\), it has 40 x 30\.0"):
        boxes("a.png", (30, 41))


def test_images_are_told_apart_by_their_folders(tmp_path):
    boxes = coco(tmp_path, ["a/0.png", "b/0.png", "1.png", "val/2.png"], [(0, 1), (1, 2), (2, 3)])
    assert left(boxes, "a/0.png") == [1]
    assert left(boxes, "/data/b/0.png") == [2]
    assert left(boxes, "./photos/1.png") == [3]
    assert left(boxes, "2.png") == []
    with pytest.raises(ValueError, match=r"must have one image '0\.png', got a/0\.png, b/0\.png"):
        boxes.find("0.png")
    with pytest.raises(ValueError, match=r"has no image 'c/0\.png'"):
        boxes.find("c/0.png")
    boxes.check_paths(["x/a/0.png", "b/0.png", "nowhere.png", "1.png"])
    with pytest.raises(ValueError, match=r"tell x/1\.png and y/1\.png apart, .* boxes of 1\.png"):
        boxes.check_paths(["x/1.png", "y/1.png"])


@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_accents_may_be_written_in_two_ways(tmp_path, written):
    name = "caf\u00e9.png"
    boxes = coco(tmp_path, [unicodedata.normalize(written, name)], [(0, 4)])
    assert [left(boxes, unicodedata.normalize(form, name)) for form in ("NFC", "NFD")] == [[4], [4]]
    with pytest.raises(ValueError, match=r"got 'caf\\xe9\.png' and 'cafe\\u0301\.png' \(id 1\)"):
        coco(tmp_path, [unicodedata.normalize(form, name) for form in ("NFC", "NFD")], [])


@pytest.mark.parametrize("image", [5, "5", None, "a.png", [0]])
def test_objects_of_no_image_are_refused(tmp_path, image):
    with pytest.raises(ValueError, match="is not the id of an image"):
        coco(tmp_path, ["a.png"], [(image, 0)])
