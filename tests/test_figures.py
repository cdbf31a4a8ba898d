"""The figure of an attack."""

import numpy as np
import pytest
import torch
from PIL import Image

from dagcore.evaluation import figures


def draw(path, predicted, attacked, perturbation=0.0, **options):
    height, width = 60, 80
    image = torch.full((3, height, width), 0.2)
    figures.attack_figure(
        path,
        image=image,
        adversarial=image + perturbation,
        predicted=predicted,
        attacked=attacked,
        **options,
    )
    return np.array(Image.open(path).convert("RGB"))


def panel(figure, k):
    """The colours within panel k, without its frame, whose left edge is the first one."""
    dark = (figure < 60).all(2)
    left = int(dark.any(0).argmax())
    rows = np.flatnonzero(dark[:, left])
    assert rows[-1] - rows[0] == round(figures.PANEL_WIDTH * 0.75) + 1
    left += k * (figures.PANEL_WIDTH + figures.GAP)
    return figure[rows[0] + 1 : rows[-1], left + 1 : left + 1 + figures.PANEL_WIDTH]


def test_panels_show_image_segmentation_perturbation_and_attack(tmp_path):
    predicted = torch.tensor([[0, 1], [1, 1]])
    attacked = torch.tensor([[2, 2], [2, 2]])
    figure = draw(tmp_path / "f.png", predicted, attacked, perturbation=0.01)
    assert np.unique(panel(figure, 0)) == 51
    assert np.unique(panel(figure, 2)) in (153, 154)  # 0.5 + 10 * 0.01
    before, after = panel(figure, 1), panel(figure, 3)
    height, width = before.shape[:2]
    assert tuple(before[height // 4, width // 4]) == (0, 0, 0)
    assert tuple(before[height // 4, width * 3 // 4]) == (128, 0, 0)
    assert len(np.unique(before.reshape(-1, 3), axis=0)) == 2  # enlarged without mixing
    assert np.all(after == (0, 128, 0))


def test_palettes():
    voc = figures.voc_palette(64)
    assert voc[[0, 1, 2, 15]].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128]]
    for colours in (voc, figures.rank_palette(40)):
        assert len(np.unique(colours, axis=0)) == len(colours)


def test_a_palette_of_the_victims_is_used(tmp_path):
    labels = torch.ones(6, 8, dtype=torch.int64)
    figure = draw(tmp_path / "f.png", labels, labels, palette=[(9, 9, 9), (1, 2, 3)])
    assert np.all(panel(figure, 1) == (1, 2, 3))


@pytest.mark.parametrize("count", [1, 12, 13, 48])
def test_many_classes_and_awkward_names(tmp_path, count):
    labels = 900 + torch.arange(48).reshape(6, 8) % count
    names = [f"$class$ _{k} with quite a long name" for k in range(948)]
    figure = draw(tmp_path / "f.png", labels, labels.flip(0), classes=names, note="a $note")
    colours = np.unique(panel(figure, 1).reshape(-1, 3), axis=0)
    assert len(colours) == count


def test_shares_lists_what_was_frequent_first():
    before, after = torch.tensor([5, 5, 5, 7]), torch.tensor([3, 3, 7, 9])
    table = figures.shares(before, after)
    assert list(table) == [5, 7, 3, 9]
    assert table[7] == [0.25, 0.25]


def test_nothing_is_left_of_a_figure_that_failed(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("PIL.Image.Image.save", fail)
    labels = torch.zeros(6, 8, dtype=torch.int64)
    with pytest.raises(OSError, match="disk full"):
        draw(tmp_path / "f.png", labels, labels)
    assert list(tmp_path.iterdir()) == []


def test_detections_of_a_lower_score_are_not_drawn(tmp_path):
    nothing = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "scores": torch.zeros(0),
    }
    found = {
        "boxes": torch.tensor([[10.0, 10.0, 60.0, 50.0], [0.0, 0.0, 80.0, 60.0]]),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.9, 0.2]),
    }
    figure = draw(tmp_path / "f.png", found, nothing, classes=["none", "cat", "dog"])
    before, after = panel(figure, 1), panel(figure, 3)
    assert (before == (128, 0, 0)).all(2).any()
    assert not (before == (0, 128, 0)).all(2).any()
    assert np.unique(after) == 51


@pytest.mark.parametrize(("height", "width"), [(4000, 2), (2, 4000), (3000, 4000)])
def test_panels_are_of_a_bounded_size(tmp_path, height, width):
    image, labels = torch.zeros(3, height, width), torch.zeros(2, 2, dtype=torch.int64)
    path, note = tmp_path / "f.png", "in\nlines " * 40
    figures.attack_figure(
        path, image=image, adversarial=image, predicted=labels, attacked=labels, note=note
    )
    with Image.open(path) as figure:
        assert figure.height < figures.PANEL_HEIGHT + 200
        assert 4 * figures.PANEL_WIDTH < figure.width < 10 * figures.PANEL_WIDTH
        ink = (np.array(figure)[-figures.LINE :] < 200).any((0, 2))
    assert ink[:-8].any()
    assert not ink[-8:].any()  # the whole note is there


def test_detections_that_have_no_place_are_not_drawn(tmp_path):
    nan, inf = float("nan"), float("inf")
    found = {
        "boxes": torch.tensor([[nan, 10, 60, 50], [60, 10, 10, 50], [20, 15, inf, 1e30]]),
        "labels": torch.tensor([1, 2, 3]),
        "scores": torch.tensor([0.9, 0.8, 0.7]),
    }
    figure = draw(tmp_path / "f.png", found, found)
    before = panel(figure, 1)
    assert not (before == (128, 0, 0)).all(2).any()
    assert not (before == (0, 128, 0)).all(2).any()
    yellow = (before == (128, 128, 0)).all(2)
    scale = figures.PANEL_WIDTH / 80
    assert np.flatnonzero(yellow.any(0)).tolist()[0] == round(20 * scale)
    assert np.flatnonzero(yellow.any(1)).tolist()[0] == round(15 * scale)
    assert yellow[-1].any()  # the box goes on to the panel's edges, and beyond
    assert not yellow[-60:, 200:].any()
