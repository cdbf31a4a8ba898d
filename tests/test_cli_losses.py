"""`dagcore attack` and `dagcore run` with attacks on dense losses."""

import json
import sys

import command_line
import numpy as np
import pytest
import skimage.data
import torch
from command_line import check_outputs, pixels, record
from PIL import Image

import dagcore
from dagcore.__main__ import main
from dagcore.data import Scenes
from dagcore.evaluation.settings import tomllib
from dagcore.victims import load

HEIGHT, WIDTH = 48, 64

VICTIM = """
import torch
from torch import nn

def make():
    net = nn.Conv2d(3, 5, 2, 2, bias=False)
    weight = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    net.weight.data = weight - weight.mean((1, 2, 3), keepdim=True)
    net.classes = ("sky", "fur", "eye", "nose", "ear")
    return net
"""
ATTACKS = {
    "pgd": ("--steps", 4, "--loss", "jensen-shannon"),
    "segpgd": ("--steps", 4, "--restarts", 2),
    "cospgd": ("--steps", 4, "--norm", "l2", "--epsilon", 2, "--alpha", 0.5),
    "apgd": ("--steps", 6, "--epsilon", "4/255"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with photographs and a victim of the user's own."""
    photo = Image.fromarray(skimage.data.chelsea())
    (tmp_path / "photos").mkdir()
    for k, name in enumerate("abc"):
        photo.crop((60 * k, 40 * k, 60 * k + 192, 40 * k + 144)).resize((WIDTH, HEIGHT)).save(
            tmp_path / "photos" / f"{name}.png"
        )
    (tmp_path / "loss_victim.py").write_text(VICTIM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "loss_victim", raising=False)
    return tmp_path


def attack(*arguments, **options):
    given = {"model": "loss_victim:make", "image": "photos/a.png"} | options
    return command_line.attack(*arguments, **given)


def refused(capsys, *arguments):
    return command_line.refused(capsys, *arguments, model="loss_victim:make", image="photos/a.png")


@pytest.mark.parametrize("name", ATTACKS)
def test_the_file_is_what_was_attacked_and_within_epsilon(folder, name):
    assert attack("--attack", name, *ATTACKS[name]) == 0
    clean = pixels(folder / "photos/a.png")
    told = check_outputs(folder / "out", "a", clean)
    assert (told["attack"], told["adversarial"]) == (name, "untargeted")
    epsilon = told["settings"]["epsilon"]
    written = pixels(folder / "out/a.png")
    away = (written - clean).flatten()
    size = away.abs().max() if told["settings"]["norm"] == "linf" else away.norm()
    assert 0 < float(size) <= epsilon + 1e-6
    victim = load("loss_victim:make")
    labels = dagcore.ops.argmax_bilinear(victim(clean[None]), (HEIGHT, WIDTH))
    seen = dagcore.ops.argmax_bilinear(victim(written[None]), (HEIGHT, WIDTH))
    right = int((seen == labels).sum())
    # On the grid of 8 bits nothing is lost by writing: what counts is what the file holds.
    assert told["active_after_rounding"] == told["left"] == min(told["active"]) == right
    assert told["to_fool"] == told["correct_before"] == HEIGHT * WIDTH
    assert right < HEIGHT * WIDTH


def test_the_python_call_with_the_same_seed_gives_the_same_file(folder):
    assert attack("--attack", "pgd", "--steps", 3, "--seed", 5) == 0
    victim, told = load("loss_victim:make"), record("a")
    image = pixels(folder / "photos/a.png")
    labels = dagcore.ops.argmax_bilinear(victim(image[None]), (HEIGHT, WIDTH))
    sample = dagcore.Sample(image, labels[0], seed=told["generator_seed"])
    (result,) = dagcore.PGD(steps=3, levels=256).stream(victim, [sample])
    assert torch.equal((result.adversarial[0] * 255).round(), pixels(folder / "out/a.png") * 255)
    assert result.active[:, 0].tolist() == told["active"]


def test_a_targeted_attack_counts_what_is_not_at_its_class(folder):
    options = ("--attack", "cospgd", "--adversarial", "eye", "--epsilon", "40/255", "--steps", 20)
    assert attack(*options, "--alpha", "4/255") == 0
    told = record("a")
    victim = load("loss_victim:make")
    seen = dagcore.ops.argmax_bilinear(victim(pixels(folder / "out/a.png")[None]), (HEIGHT, WIDTH))
    assert told["left"] == int((seen != 2).sum())
    clean = victim(pixels(folder / "photos/a.png")[None])
    before = dagcore.ops.argmax_bilinear(clean, (HEIGHT, WIDTH))
    assert told["to_fool"] == int((before != 2).sum())
    assert told["left"] < told["to_fool"] / 2


def test_a_run_is_resumed_and_compared_by_its_settings(folder, capsys):
    (folder / "run.toml").write_text(
        'data = "photos"\nmodel = "loss_victim:make"\nattack = "apgd"\nloss = "margin"\n'
        'epsilon = "4/255"\nsteps = 5\nfigures = 0\nout = "out"\ndevice = "cpu"\n'
    )
    assert main(["run", "--config", "run.toml"]) == 0
    kept = tomllib.loads((folder / "out/settings.toml").read_text())
    assert kept["attack"] == "apgd"
    assert kept["loss"] == "margin"
    assert kept["epsilon"] == 4 / 255
    assert (kept["norm"], kept["restarts"], kept["adversarial"]) == ("linf", 1, "untargeted")
    assert not {"gamma", "max_iter", "margin", "alpha", "goal"} & set(kept)
    first = (folder / "out/images.jsonl").read_bytes()
    summary = json.loads((folder / "out/summary.json").read_text())
    assert summary["mIoU"]["after"]["mean"] < summary["mIoU"]["before"]["mean"] == 100
    (folder / "out/images.jsonl").unlink()  # the records of two images are lost
    for name in "bc":
        next((folder / "out").rglob(f"records/{name}.json"), folder / "nothing").unlink(
            missing_ok=True
        )
    assert main(["run", "--config", "run.toml"]) == 0
    assert (folder / "out/images.jsonl").read_bytes() == first
    capsys.readouterr()
    assert main(["run", "--config", "run.toml", "--steps", "6"]) == 2
    assert "steps" in capsys.readouterr().err
    assert main(["run", "--config", "out/settings.toml", "--out", "again"]) == 0
    assert (folder / "again/images.jsonl").read_bytes() == first


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--attack", "pgd", "--gamma", "1/255"), "--gamma requires --attack dag, got"),
        (("--attack", "apgd", "--alpha", "1/255"), "--alpha requires --attack pgd, segpgd or cos"),
        (("--attack", "segpgd", "--loss", "dlr"), "--loss requires --attack pgd or apgd, got"),
        (
            ("--steps", "3"),
            "--steps requires --attack pgd, segpgd, cospgd or apgd, got",
        ),
        (("--attack", "pgd", "--goal", "reach"), "--goal requires --attack dag, got --attack pgd"),
        (("--adversarial", "untargeted"), "--adversarial untargeted cannot be used with DAG's"),
        (("--attack", "pgd", "--adversarial", "runner-up"), "runner-up requires DAG's loss"),
        (("--attack", "pgd", "--epsilon", "0"), "epsilon must be a finite number above 0, got 0"),
        (("--attack", "fgsm"), "'fgsm' is not one of 'dag', 'pgd', 'segpgd', 'cospgd', 'apgd'"),
    ],
)
def test_options_that_do_not_go_together_end_in_one_line(folder, capsys, options, says):
    assert says in refused(capsys, *options)


@pytest.mark.parametrize("adversarial", ["untargeted", "vanish"])
def test_a_detector_is_attacked_at_its_proposals(folder, adversarial):
    scene = next(iter(Scenes("07", "test", count=1)))
    levels = (scene.image * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(np.ascontiguousarray(levels)).save("scene.png")
    options = ("--attack", "pgd", "--steps", 6, "--adversarial", adversarial)
    assert attack(*options, model="FR-ZF-07", image="scene.png") == 0
    told = record("scene")
    assert told["left"] == told["active_after_rounding"] < told["to_fool"] <= told["targets"]
    if adversarial == "untargeted":
        assert told["to_fool"] == told["correct_before"]
