"""Every script in examples/ runs as its first lines say, and so do the cells of the notebook."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from dagcore import files
from dagcore.data import Scenes

EXAMPLES = Path(__file__).parents[1] / "examples"
MOST_LINES = 40

few_updates = pytest.mark.filterwarnings("ignore:.*more updates would leave fewer:RuntimeWarning")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a script in an empty folder, and gives back what it has printed."""
    pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        torch.manual_seed(0)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def photographs():
    """Two scenes as files, with their label maps."""
    for folder in ("photos", "maps"):
        Path(folder).mkdir()
    for k, scene in enumerate(Scenes("07", "test", count=2)):
        files.write_image(Path(f"photos/{k}.png"), scene.image)
        Image.fromarray(scene.mask.numpy()).save(f"maps/{k}.png")


def changed(one, other):
    """The largest difference of two image files, in levels."""
    away = (files.read_image(Path(one)) - files.read_image(Path(other))).abs().max()
    return round(255 * float(away))


def test_attack_segmentation(run):
    photographs()
    (line,) = run("attack_segmentation.py", "--image", "photos/0.png", "--max-iter", 3)
    assert "of 20480 pixels keep their class" in line
    assert 1 <= changed("attacked.png", "photos/0.png") <= 3
    run("attack_segmentation.py", "--max-iter", 0, "--out", "scene.png")
    assert changed("scene.png", "photos/0.png") == 0


@pytest.mark.parametrize("name", ["FCOS-VGG", "FR-VGG-07"])
def test_attack_detector(run, name):
    result, before, after = run("attack_detector.py", "--model", name, "--max-iter", 3)
    assert "targets are left" in result
    assert before.startswith("before: ")
    assert after.startswith("after:  ")


def test_attack_data_set(run):
    photographs()
    folders = ("photos", "maps", "out")
    lines = run("attack_data_set.py", "FCN-VGG", *folders, "--max-iter", 4, "--slots", 2)
    assert sorted(line.partition(":")[0] for line in lines) == ["0.png", "1.png"]
    for name in ("0.png", "1.png"):
        assert 1 <= changed(f"out/{name}", f"photos/{name}") <= 4


@few_updates
def test_sea(run):
    arguments = ("--steps", 6, "--images", 1, "--check", 0)
    clean, memory, file, told = run("sea.py", *arguments)
    assert clean.startswith("clean: mIoU ")
    assert memory.startswith("worst case, memory: aAcc ")
    assert file.startswith("worst case, file: aAcc ")
    assert told == "see results/report.html"
    assert "sea-2024, 6 steps" in Path("results/report.html").read_text()


def test_sea_as_it_is_published_keeps_its_name():
    code = (EXAMPLES / "sea.py").read_text()
    assert 'PROTOCOLS["sea-2024"]' in code
    assert '"--steps", type=int, default=300' in code


@few_updates
def test_the_notebook(tmp_path, monkeypatch, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    before = matplotlib.get_backend()
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = []
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(pyplot.gcf()))
    namespace: dict[str, object] = {}
    for cell in json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)
    pyplot.close("all")
    matplotlib.use(before)
    assert len(shown) == 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["PGD", "SegPGD", "CosPGD", "APGD"]
    assert sum(line.startswith("worst case") for line in lines) == 2


def test_the_notebook_has_no_outputs():
    for cell in json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_scripts_are_short_and_say_how_they_are_called(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= MOST_LINES
    assert lines[2].startswith(f"python examples/{path.name}")
