from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from dagcore.data import VOC, VOC_CLASSES
from dagcore.data.voc import unknown_voc_names

HEIGHT, WIDTH = 12, 16


def add_image(path: Path, value: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 100, 200)).save(path, quality=100)


def add_mask(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.frombytes("P", values.shape[::-1], values.astype(np.uint8).tobytes())
    mask.putpalette([k * 37 % 256 for k in range(768)])
    mask.save(path)


def add_list(folder: Path, kind: str, name: str, *keys: str) -> None:
    path = folder / "ImageSets" / kind / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{key}\n" for key in keys))


def thing(name: str, box: tuple[object, ...], difficult: str | None = None) -> str:
    corners = "".join(
        f"<{corner}>{value}</{corner}>"
        for corner, value in zip(("xmax", "xmin", "ymax", "ymin"), box, strict=True)
    )
    flag = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    return f"<object><name>{name}</name>{flag}<bndbox>{corners}</bndbox>{part}</object>"


def annotate(folder: Path, key: str, *things: str, head: str = "") -> None:
    path = folder / "Annotations" / f"{key}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"{head}<annotation><filename>{key}.jpg</filename>{''.join(things)}</annotation>"
    )


def stripes(*classes: int) -> np.ndarray:
    """A mask with one class after another from the left, and void in the last column."""
    mask = np.repeat(np.array(classes), -(-WIDTH // len(classes)))[None, :WIDTH].repeat(HEIGHT, 0)
    mask[:, -1] = 255
    return mask


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """VOC2007 with three images and VOC2012 with three more, in the real layout."""
    old, new = tmp_path / "VOC2007", tmp_path / "VOC2012"
    for value, key in enumerate(("000005", "000007", "000009")):
        add_image(old / "JPEGImages" / f"{key}.jpg", 50 * value)
    annotate(
        old,
        "000005",
        thing("chair", (16, 1, 12, 1), "0"),
        thing("person", (9, 5, 8, 3), "1"),
        thing("tvmonitor", ("9.5", "4.25", 8, 3)),
    )
    annotate(old, "000007")
    annotate(old, "000009", thing("aeroplane", (3, 3, 4, 4)))
    add_list(old, "Main", "trainval", "000005", "000007")
    add_list(old, "Main", "test", "000009")
    add_list(old, "Segmentation", "trainval", "000005")
    add_mask(old / "SegmentationClass" / "000005.png", stripes(0, 9, 15, 20))
    for key in ("2008_000001", "2008_000002", "2008_000003"):
        add_image(new / "JPEGImages" / f"{key}.jpg", 10)
    add_list(new, "Segmentation", "train", "2008_000001")
    add_list(new, "Segmentation", "val", "2008_000002")
    add_list(new, "Main", "trainval", "2008_000003")
    for key, label in (("2008_000001", 1), ("2008_000002", 2)):
        add_mask(new / "SegmentationClass" / f"{key}.png", stripes(label))
    annotate(new, "2008_000003", thing("dog", (2, 1, 2, 1), "0"))
    return tmp_path


def test_detection(root: Path) -> None:
    voc = VOC(root, "detection", sets=[("2007", "trainval")])
    assert len(voc) == 2
    first, second = voc
    assert (first.key, second.key) == ("000005", "000007")
    assert first.image.shape == (3, HEIGHT, WIDTH)
    assert first.image.dtype == torch.float32
    assert float((first.image[2] - 200 / 255).abs().max()) < 0.02
    assert first.mask is None
    # 1-based and inclusive in the file: the whole image is 1..16, 1..12.
    assert first.boxes.tolist() == [[0, 0, 16, 12], [4, 2, 9, 8], [3.25, 2, 9.5, 8]]
    assert first.boxes.dtype == torch.float32
    assert [VOC_CLASSES[label] for label in first.labels] == ["chair", "person", "tvmonitor"]
    assert first.labels.tolist() == [9, 15, 20]
    assert first.difficult.tolist() == [False, True, False]
    # An image without objects is an example like any other.
    assert second.boxes.shape == (0, 4)
    assert second.labels.shape == second.difficult.shape == (0,)
    assert second.difficult.dtype == torch.bool


def test_several_sets_and_years(root: Path) -> None:
    voc = VOC(
        root, "detection", sets=(("2007", "trainval"), ("2012", "trainval"), ("2007", "test"))
    )
    assert [example.key for example in voc] == ["000005", "000007", "2008_000003", "000009"]
    assert voc[-1].boxes.tolist() == [[2, 3, 3, 4]]
    twice = VOC(root, "detection", sets=[("2007", "trainval"), ("2007", "trainval")])
    assert len(twice) == 2


def test_segmentation(root: Path) -> None:
    (example,) = VOC(str(root))
    assert example.key == "000005"
    assert example.mask is not None
    assert example.mask.dtype == torch.uint8
    assert torch.equal(example.mask, torch.from_numpy(stripes(0, 9, 15, 20)).byte())
    assert example.boxes.shape == (0, 4)


def add_release(root: Path) -> None:
    release = root / "benchmark_RELEASE" / "dataset"
    for name, keys in (
        ("train", ("2008_000001", "2008_000004")),
        ("val", ("2008_000002", "2008_000005")),
    ):
        release.mkdir(parents=True, exist_ok=True)
        (release / f"{name}.txt").write_text("\n".join(keys))
        for key in keys:
            add_image(release / "img" / f"{key}.jpg")
            (release / "cls").mkdir(exist_ok=True)
            mask = np.full((HEIGHT, WIDTH), 7, np.uint8)
            content = {"GTcls": {"Segmentation": mask, "CategoriesPresent": 7}}
            savemat(release / "cls" / f"{key}.mat", content)


def add_pngs(root: Path) -> None:
    for key in ("2008_000001", "2008_000002", "2008_000004", "2008_000005"):
        add_mask(root / "VOC2012" / "SegmentationClassAug" / f"{key}.png", np.full((12, 16), 7))
        add_image(root / "VOC2012" / "JPEGImages" / f"{key}.jpg")


@pytest.mark.parametrize("add", [add_release, add_pngs])
def test_sbd_adds_masks_but_never_those_of_val(root: Path, add) -> None:
    train = [("2012", "train")]
    assert VOC(root, sets=train, sbd="auto").extra == 0
    add(root)
    assert len(VOC(root, sets=train)) == 1
    voc = VOC(root, sets=train, sbd="auto")
    assert voc.extra == 2
    assert [example.key for example in voc] == ["2008_000001", "2008_000004", "2008_000005"]
    masks = [example.mask for example in voc]
    assert masks[0] is not None
    assert masks[0][0, 0] == 1  # where VOC has a mask of its own it is the one
    assert all(mask is not None and bool((mask == 7).all()) for mask in masks[1:])
    assert all(mask is not None and mask.dtype == torch.uint8 for mask in masks)


def test_sbd_without_scipy_says_what_to_install(root: Path, monkeypatch) -> None:
    add_release(root)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match=r'scipy is missing: pip install "dagcore\[data\]"'):
        VOC(root, sbd="auto")


def test_missing_files_are_named(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"root must be a VOCdevkit folder, .*nowhere"):
        VOC(root / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"image list .*VOC2012.*test.txt does not exist"):
        VOC(root, sets=[("2012", "test")])
    with pytest.raises(FileNotFoundError, match=r"image list .*VOC2010.*does not exist"):
        VOC(root, sets=[("2010", "train")])
    for task, name in (
        ("segmentation", "SegmentationClass/000005.png"),
        ("detection", "Annotations/000005.xml"),
        ("detection", "JPEGImages/000005.jpg"),
    ):
        (root / "VOC2007" / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
            VOC(root, task)[0]


@pytest.mark.parametrize("key", ["../000005", "/etc/hostname", "a\\b", "..", "c:x"])
def test_ids_that_lead_elsewhere_are_refused(root: Path, key: str) -> None:
    add_list(root / "VOC2007", "Main", "bad", "000005", key)
    with pytest.raises(ValueError, match=r"an image id in .* must be a plain name, got "):
        VOC(root, "detection", sets=[("2007", "bad")])


def test_arguments_are_checked(root: Path) -> None:
    with pytest.raises(ValueError, match="task must be 'segmentation' or 'detection', got 'both'"):
        VOC(root, "both")
    with pytest.raises(ValueError, match="sbd must be None or 'auto', got True"):
        VOC(root, sbd=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sbd must be None for task 'detection'"):
        VOC(root, "detection", sbd="auto")
    with pytest.raises(ValueError, match=r"sets must hold pairs such as .*, got '2007'"):
        VOC(root, sets=("2007", "trainval"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be a plain name, got '\.\./\.\./lists'"):
        VOC(root, sets=[("2007", "../../lists")])
    add_list(root / "VOC2007", "Main", "cat_train", "000005 -1")
    with pytest.raises(ValueError, match="must have one image id in a line, got '000005 -1'"):
        VOC(root, "detection", sets=[("2007", "cat_train")])
    add_list(root / "VOC2007", "Main", "empty")
    with pytest.raises(ValueError, match="sets must name at least one image"):
        VOC(root, "detection", sets=[("2007", "empty")])


BOMB = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "chair"><!ENTITY c "&b;&b;">]>'


@pytest.mark.parametrize(
    ("things", "head", "message"),
    [
        ([thing("&c;", (3, 3, 4, 4))], BOMB, "a DOCTYPE is not allowed"),
        ([], '<!DOCTYPE annotation SYSTEM "file:///etc/hostname">', "a DOCTYPE is not allowed"),
        (["<object>"], "", "mismatched tag"),
        ([thing("unicorn", (3, 3, 4, 4))], "", "must be one of aeroplane, bicycle, "),
        ([thing("background", (3, 3, 4, 4))], "", "got 'background'"),
        ([thing("cat", (3, 5, 4, 4))], "", "must have xmin <= xmax and ymin <= ymax"),
        ([thing("cat", ("nan", 3, 4, 4))], "", "must have xmin <= xmax and ymin <= ymax"),
        ([thing("cat", (3, 3, 4, 4), "maybe")], "", "invalid literal"),
        (
            ["<size><width>16</width><height>13</height></size>"],
            "",
            "its image must have 16 x 13 pixels, it has 16 x 12",
        ),
        ([thing("cat", ("", 3, 4, 4))], "", "could not convert string to float"),
    ],
)
def test_bad_annotations(root: Path, things: list[str], head: str, message: str) -> None:
    annotate(root / "VOC2007", "000005", *things, head=head)
    with pytest.raises(ValueError, match=f"annotation .*000005.xml cannot be read: .*{message}"):
        VOC(root, "detection")[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        ("0", False),
        ("Unspecified", False),
        ("false", False),
        (" 1 ", True),
        ("True", True),
    ],
)
def test_difficult_as_tools_write_it(root: Path, text: str, expected: bool) -> None:
    annotate(root / "VOC2007", "000005", thing("cat", (3, 3, 4, 4), text))
    assert VOC(root, "detection")[0].difficult.tolist() == [expected]


def test_boxes_are_cut_at_the_border_and_unknown_classes_left_out(root: Path) -> None:
    things = [
        thing("cat", (9, 0, 13, 0)),  # xmax, xmin, ymax, ymin of 16 x 12 pixels
        thing("unicorn", (3, 3, 4, 4)),
        thing("dog", (30, 20, 4, 4)),  # outside
        thing("dog", (17, 16, 5, 2)),
    ]
    size = "<size><width>16</width><height>0</height></size>"
    annotate(root / "VOC2007", "000005", size, *things)
    example = VOC(root, "detection")[0]
    assert example.boxes.tolist() == [[0, 0, 9, 12], [15, 1, 16, 5]]
    assert [VOC_CLASSES[label] for label in example.labels] == ["cat", "dog"]
    path = root / "VOC2007" / "Annotations" / "000005.xml"
    assert unknown_voc_names(path) == ["unicorn"]


def test_bad_masks(root: Path) -> None:
    path = root / "VOC2007" / "SegmentationClass" / "000005.png"
    add_mask(path, np.zeros((HEIGHT, WIDTH - 1)))
    with pytest.raises(ValueError, match=r"must have the size of .*, \(12, 16\), got \(12, 15\)"):
        VOC(root)[0]
    add_mask(path, np.full((HEIGHT, WIDTH), 21))
    with pytest.raises(ValueError, match="must have classes below 21 or 255, got 21"):
        VOC(root)[0]
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        VOC(root)[0]


def test_bad_mat_files(root: Path) -> None:
    add_release(root)
    voc = VOC(root, sets=[("2012", "train")], sbd="auto")
    path = root / "benchmark_RELEASE" / "dataset" / "cls" / "2008_000004.mat"
    savemat(path, {"other": 1})
    with pytest.raises(ValueError, match=r"2008_000004.mat cannot be read as a mask of SBD"):
        voc[1]
    path.write_bytes(b"no such format")
    with pytest.raises(ValueError, match=r"2008_000004.mat cannot be read as a mask of SBD"):
        voc[1]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"2008_000004.mat does not exist"):
        voc[1]
