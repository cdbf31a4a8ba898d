"""The command line on real files, through its real entry point."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys

import click
import command_line
import numpy as np
import pytest
import skimage.data
import torch
from command_line import check_outputs, command, pixels, record
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import dagcore
from dagcore.__main__ import main
from dagcore.cli import COMMANDS, demo, run
from dagcore.errors import ArgumentError, ArgumentTypeError
from dagcore.evaluation import Settings

HEIGHT, WIDTH = 64, 96

# Five kinds of local contrast, at half the size of the image: easily attacked to the end.
VICTIM = """
import torch
from torch import nn
from dagcore.victims import Victim

def coarse():
    net = nn.Conv2d(3, 5, 2, 2, bias=False)
    weight = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    net.weight.data = weight - weight.mean((1, 2, 3), keepdim=True)
    net.classes = ("sky", "fur", "eye", "nose", "ear")
    return net

def make():
    return Victim(coarse(), classes=coarse().classes, cells=True)

def failing():
    def model(images):
        model.calls += 1
        if model.calls > 3:
            raise ValueError("a bug of mine")
        return inside(images)

    inside, model.calls = coarse(), 0
    return model

def layers():
    net, calls = coarse(), []

    def check(module, inputs):
        calls.append(1)
        return (inputs[0][:, :2],) if len(calls) > 3 else None

    net.register_forward_pre_hook(check)
    return net

def wrong():
    return 3

def broken():
    return {}["lost"]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with a photograph and a victim of the user's own."""
    photo = Image.fromarray(skimage.data.chelsea()).resize((WIDTH, HEIGHT))
    photo.save(tmp_path / "cat.png")
    (tmp_path / "cli_victim.py").write_text(VICTIM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cli_victim", raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def lraspp(tmp_path_factory):
    torch.manual_seed(0)
    network = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    path = tmp_path_factory.mktemp("weights") / "lraspp.pth"
    torch.save(network.state_dict(), path)
    return path


def attack(*arguments, model="cli_victim:make", **options):
    return command_line.attack(*arguments, model=model, **options)


def refused(capsys, *arguments, model="cli_victim:make", **options):
    return command_line.refused(capsys, *arguments, model=model, **options)


def test_attack_with_the_users_own_victim(folder):
    done = command("attack", "cat.png", "--model", "cli_victim:make", "--out", "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "cat" in done.stdout
    assert "converged" in done.stdout
    assert done.stderr.startswith("[1/1] cat: converged after")
    numbers = check_outputs(folder / "out", "cat", pixels("cat.png"))
    assert numbers["status"] == "converged"
    assert numbers["active"][-1] == 0
    assert numbers["targets"] == numbers["active"][0] == HEIGHT * WIDTH // 4
    assert numbers["label_map"] == [HEIGHT // 2, WIDTH // 2]
    assert numbers["settings"]["gamma"] == 0.5 / 255
    assert numbers["versions"]["torch"] == str(torch.__version__)


def test_counts_after_rounding_are_those_of_the_written_file(folder):
    assert attack() == 0
    import cli_victim

    victim = cli_victim.make()
    clean, written = pixels("cat.png")[None], pixels("out/cat.png")[None]
    with torch.no_grad():
        kept = victim(written).argmax(1) == victim(clean).argmax(1)
    assert record()["active_after_rounding"] == int(kept.sum())


def test_attack_warns_of_a_file_that_fails(folder, capsys):
    assert attack("--levels", "none") == 0
    left = record()["active_after_rounding"]
    assert left > 0
    warning = "dagcore attack: warning: 1 of 1 images that converged have active targets in their"
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith(warning)]
    assert f"most in cat.png: {left} of " in line
    assert attack("--margin", "0.1", out="kept") == 0
    assert "warning" not in capsys.readouterr().err
    assert record(out="kept")["settings"]["levels"] == 256
    assert record(out="kept")["settings"]["margin"] == 0.1
    assert record(out="kept")["active_after_rounding"] == 0


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_attack_with_weights_from_a_file(folder, lraspp, kind):
    path = lraspp
    if kind == "safetensors":
        path = folder / "lraspp.safetensors"
        save_file(torch.load(lraspp), path)
    done = attack("--weights", path, "--max-iter", 3, model="lraspp_mobilenet_v3_large")
    assert done == 0
    numbers = check_outputs(folder / "out", "cat", pixels("cat.png"))
    assert numbers["num_classes"] == 4
    assert numbers["weights"] == str(path)
    assert numbers["iterations"] <= 3


def test_attack_on_the_demo_network(folder):
    assert attack("--adversarial", "strawberry", "--max-iter", 60, model="demo") == 0
    numbers = check_outputs(folder / "out", "cat", pixels("cat.png"))
    assert numbers["class"] == 949
    assert numbers["status"] == "converged"


def test_a_pattern_is_painted(folder):
    done = attack(
        "--adversarial", "square", "--foreground", "nose", "--background", 1, "--max-iter", 2
    )
    assert done == 0
    numbers = record()
    assert numbers["settings"]["goal"] == "reach"
    assert (numbers["foreground"], numbers["background"]) == (3, 1)
    assert numbers["targets"] == HEIGHT * WIDTH // 4


def test_pattern_classes_are_chosen_from_the_labels(folder):
    labels = np.full((HEIGHT // 2, WIDTH // 2), 4, np.uint8)
    labels[:2] = 1
    labels[-4:] = 255
    Image.fromarray(labels).save("labels.png")
    assert attack("--adversarial", "circle", "--labels", "labels.png", "--max-iter", 1) == 0
    numbers = record()
    assert numbers["background"] == 4
    assert numbers["foreground"] in (0, 2, 3)
    assert numbers["targets"] == labels.size - 4 * WIDTH // 2


def test_label_maps_from_a_folder(folder):
    Image.open("cat.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("tac.jpg")
    os.mkdir("maps")
    for name, value in (("cat", 0), ("tac", 255)):
        Image.fromarray(np.full((HEIGHT // 2, WIDTH // 2), value, np.uint8)).save(
            f"maps/{name}.png"
        )
    assert attack("--labels", "maps", image=["cat.png", "tac.jpg"]) == 0
    assert record("cat")["targets"] == HEIGHT * WIDTH // 4
    assert record("tac")["targets"] == 0
    assert record("tac")["iterations"] == 0


def test_targets_are_pixels_where_the_score_map_is_coarser(folder):
    assert attack("--max-iter", 1, model="cli_victim:coarse") == 0
    numbers = record()
    assert numbers["targets"] == HEIGHT * WIDTH
    assert numbers["label_map"] == [HEIGHT, WIDTH]
    labels = np.full((HEIGHT, WIDTH), 255, np.uint8)
    labels[:5, :7] = 2
    Image.fromarray(labels).save("labels.png")
    for model in ("cli_victim:coarse", "cli_victim:make"):
        assert attack("--max-iter", 1, "--labels", "labels.png", model=model) == 0
        assert record()["targets"] == 5 * 7
        assert record()["label_map"] == [HEIGHT, WIDTH]


def test_an_image_gets_what_it_gets_alone_and_the_seed_decides(folder):
    Image.open("cat.png").save("second.png")
    for out, seed in (("one", 0), ("again", 0), ("other", 1)):
        options = ["--adversarial", "random", "--seed", seed, "--max-iter", 4]
        assert attack(*options, image=["cat.png", "second.png"], out=out) == 0
    assert attack("--adversarial", "random", "--max-iter", 4, out="alone") == 0

    def read(out, name="cat"):
        return load_file(f"{out}/{name}.perturbation.safetensors")["perturbation"]

    assert torch.equal(read("one"), read("again"))
    assert torch.equal(read("one"), read("alone"))
    assert not torch.equal(read("one"), read("other"))
    assert not torch.equal(read("one"), read("one", "second"))


def test_gamma_and_epsilon_are_read_as_fractions(folder):
    assert attack("--gamma", "1/255", "--epsilon", "2/255", "--max-iter", 5) == 0
    assert record()["settings"]["gamma"] == 1 / 255
    perturbation = load_file("out/cat.perturbation.safetensors")["perturbation"]
    assert 1 / 255 < float(perturbation.abs().max()) <= 2 / 255 + 1e-6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gamma", "x"], "fraction like 0.5/255"),
        (["--gamma", "1/0"], "fraction like 0.5/255"),
        (["--gamma", "nan"], "gamma must be a finite number above 0"),
        (["--epsilon", "-1"], "epsilon must be a finite number above 0"),
        (["--tolerance", "1"], "tolerance must be a fraction in [0, 1)"),
        (["--max-iter", "-1"], "--max-iter"),
        (["--seed", "-1"], "--seed"),
        (["--goal", "stay"], "--goal"),
        (["--device", "cuda:99"], "try cpu"),
        (["--device", "meta"], "--device must be cpu, cuda or cuda:NUMBER"),
        (["--adversarial", "5"], "class must lie in [0, 5), got 5"),
        (["--adversarial", "fir"], "near: fur"),
        (["--adversarial", "text:"], "needs words"),
        (["--adversarial", "circle:3"], "--adversarial must be"),
        (["--adversarial", "mask:none.png"], "none.png"),
        (["--adversarial", "circle", "--goal", "leave"], "--goal must be reach for a pattern"),
        (["--adversarial", "runner-up", "--goal", "reach"], "runner-up requires --goal leave"),
        (["--adversarial", "circle", "--foreground", "1", "--background", "fur"], "must differ"),
        (["--foreground", "1"], "--foreground and --background require a pattern"),
        (["--weights", "cat.png"], "weights must not be given"),
        (["--labels", "none.png"], "none.png"),
        (["--labels", "cat.png"], "palette or grey image"),
        (["--labels", "maps"], "maps/cat.png does not exist, but cat.png needs it"),
        (
            ["--labels", "large.png"],
            "must have 96 x 64 pixels (the size of the image) or 48 x 32 pixels (the size of the "
            "model's score map), got 192 x 64",
        ),
        (["--labels", "five.png"], "must hold classes below 5"),
        (["--out", "cat.png/out"], "cat.png/out"),
        (["--out", "."], "is an input and would be overwritten"),
        (["--none"], "--none"),
    ],
)
def test_bad_options_end_in_one_line(folder, capsys, options, says):
    Image.fromarray(np.zeros((HEIGHT, 2 * WIDTH), np.uint8)).save("large.png")
    Image.fromarray(np.full((HEIGHT // 2, WIDTH // 2), 5, np.uint8)).save("five.png")
    os.mkdir("maps")
    before = set(folder.rglob("*"))
    message = refused(capsys, *options)
    assert says in message
    left = {p for p in set(folder.rglob("*")) - before if "__pycache__" not in p.parts}
    assert left == set()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("resnet50", "one of demo, FCN-Alex, FCN-Alex*, FCN-VGG"),
        ("nowhere.at_all:make", "importing 'nowhere.at_all' failed"),
        ("cli_victim:none", "has no function 'none'"),
        ("cli_victim:wrong", "must return a callable"),
        ("cli_victim:broken", "model 'cli_victim:broken' failed with KeyError: 'lost'"),
    ],
)
def test_bad_models_end_in_one_line(folder, capsys, model, says):
    assert says in refused(capsys, model=model)
    assert not (folder / "out").exists()


def test_bad_images_end_in_one_line(folder, capsys):
    (folder / "words.png").write_text("not a picture")
    data = (folder / "cat.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(folder / "deep.png")
    (folder / "sub").mkdir()
    (folder / "sub" / "cat.png").write_bytes(data)
    assert "none.png" in refused(capsys, image="none.png")
    assert "cannot be read as an image" in refused(capsys, image=["cat.png", "words.png"])
    assert "cut.png cannot be read as an image" in refused(capsys, image="cut.png")
    assert "8 bits per channel" in refused(capsys, image="deep.png")
    assert "would both be written to" in refused(capsys, image=["cat.png", "sub/cat.png"])
    assert not (folder / "out").exists()


def test_an_image_the_network_cannot_take_is_named(folder, capsys, monkeypatch):
    (folder / "picky.py").write_text(
        "import torch\n"
        "def make():\n"
        "    return torch.nn.Conv2d(3, 5, 80)\n"
        "def flat():\n"
        "    return lambda x: x.flatten(2)\n"
    )
    assert "cannot take cat.png (96 x 64 pixels)" in refused(capsys, model="picky:make")
    assert "scores of shape (N, C, h, w)" in refused(capsys, model="picky:flat")


def test_an_interrupt_ends_cleanly(folder, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dagcore.evaluation.figures.attack_figure", interrupt)
    assert attack() == 130
    assert "dagcore attack: interrupted\n" in capsys.readouterr().err
    assert not list(folder.glob("out/.*"))
    assert not (folder / "out" / "cat.json").exists()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("cli_victim:failing", "failed with ValueError: a bug of mine"),
        ("cli_victim:layers", "failed with RuntimeError: Given groups=1"),
    ],
)
@pytest.mark.parametrize("name", ["attack", "run", "bench"])
def test_a_model_that_fails_in_the_middle(folder, capsys, name, model, says):
    (folder / "photos").mkdir()
    os.rename("cat.png", "photos/cat.png")
    arguments = {
        "attack": ["photos/cat.png", "--out", "out"],
        "run": ["--data", "photos", "--out", "out", "--no-prepare"],
        "bench": ["--size", "16x16", "--rounds", "1"],
    }[name]
    if name == "bench":
        arguments += ["--json", "times.json"]
    assert main([name, "--model", model, "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"dagcore {name}: error: --model {model} ")
    assert says in error


FAULTS = [
    (ArgumentError("seen must be wide"), 2, "error: seen must be wide"),
    (ArgumentTypeError("seen must be text"), 2, "error: seen must be text"),
    (OSError("no room"), 2, "error: no room"),
    (ImportError("half a package"), 2, "error: half a package"),
    (ModuleNotFoundError("?", name="pillow"), 2, "error: pillow is missing: pip install"),
    (click.UsageError("which of\nthem?"), 2, "error: which of them?"),
    (KeyError("lost"), 1, "internal error: KeyError: 'lost'"),
    (ValueError("not wide"), 1, "internal error: ValueError: not wide"),
    (TypeError("not text"), 1, "internal error: TypeError: not text"),
    (EOFError("cut"), 1, "internal error: EOFError: cut"),
]


@pytest.mark.parametrize(("error", "status", "says"), FAULTS)
@pytest.mark.parametrize("whole", [None, "before", "behind", "environment"])
def test_errors_are_the_users_or_the_programs(monkeypatch, capsys, error, status, says, whole):
    def fail(_):
        raise error

    monkeypatch.setattr("dagcore.info.show", fail)
    monkeypatch.setenv("DAGCORE_TRACEBACK", "1" if whole == "environment" else "0")
    before, behind = (["--traceback"] if whole == where else [] for where in ("before", "behind"))
    assert main([*before, "info", *behind]) == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(f"dagcore info: {says}")
    hint = "(run again with --traceback for the full traceback)"
    assert lines[-1].endswith(hint) == (status == 1 and whole is None)
    if whole is None:
        assert len(lines) == 1
    else:
        assert "Traceback (most recent call last):" in lines
        assert any("in fail" in line for line in lines)


def test_the_whole_of_a_usage_error(capsys):
    assert main(["info", "--none", "--traceback"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.splitlines()[-1].startswith("dagcore info: error: No such option")


def test_defaults_of_the_options_are_those_of_the_settings():
    given = run.command.make_context("run", []).params
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(Settings)
        if field.default is not dataclasses.MISSING
    }
    assert {name: given[name] for name in defaults} == defaults


def test_the_group_imports_no_more_than_a_command_needs():
    code = (
        "import sys\n"
        "from dagcore.__main__ import main\n"
        "for line in (['--help'], ['info']):\n"
        "    assert main(line) == 0\n"
        "print({'torchvision', 'matplotlib', 'rich', 'PIL', 'safetensors'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


def test_help_and_usage():
    top = command("--help")
    assert top.returncode == 0
    for commands in COMMANDS.values():
        assert all(f"  {name} " in top.stdout for name in commands)
    sub = command("attack", "--help")
    assert "text:WORDS" in sub.stdout
    assert "dagcore attack cat.jpg --model demo --out attacked" in sub.stdout
    bad = command("atack")
    assert bad.returncode == 2
    assert bad.stderr.startswith("dagcore: error: ")
    assert bad.stderr.count("\n") == 1


def test_without_the_command_line_packages_one_line_names_the_extra(tmp_path):
    (tmp_path / "click.py").write_text("raise ModuleNotFoundError('no click', name='click')\n")
    root = os.path.dirname(os.path.dirname(dagcore.__file__))
    bare = command("info", PYTHONPATH=os.pathsep.join([str(tmp_path), root]))
    assert bare.returncode == 2
    assert bare.stderr == 'dagcore: click is missing: pip install "dagcore[cli]"\n'
    program = [sys.executable, "-m", "dagcore.info"]
    alone = subprocess.run(program, cwd=root, capture_output=True, text=True)
    assert alone.returncode == 0


def test_info_tells_what_is_registered():
    shown = command("info")
    assert shown.returncode == 0
    lines = dict(line.split("  ", 1) for line in shown.stdout.splitlines())
    assert lines["torch"].strip() == str(torch.__version__)
    assert {"native ops on CPU", "native ops on CUDA", "threads", "GPU"} <= set(lines)
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key("dagcore::dag_seed", "CUDA")
    required = command("info", "--require-cuda-kernels")
    assert required.returncode == (0 if has_cuda else 1)


def test_demo_in_small(tmp_path, capsys):
    tmp_path /= "a folder"
    demo.run(tmp_path / "demo", ("chelsea",), (128, 96))
    shown = capsys.readouterr().out
    assert shown.count("converged") >= 3
    for attack in ("permutation", "one-class", "pattern"):
        numbers = json.loads((tmp_path / f"demo/chelsea-{attack}.json").read_text())
        assert numbers["active"][-1] == 0
        assert str(tmp_path / f"demo/chelsea-{attack}.figure.png") in shown
        assert (tmp_path / f"demo/chelsea-{attack}.figure.png").exists()
    for network in ("dl-vgg", "r-fcn-rn101"):
        assert str(tmp_path / f"demo/{network}/scene.figure.png") in shown
        numbers = json.loads((tmp_path / f"demo/{network}/scene.json").read_text())
        assert numbers["active"][0] > numbers["active"][-1]
    (line,) = (shlex.split(line) for line in shown.splitlines() if "--attack pgd" in line)
    assert line[0] == "dagcore"
    assert main([*line[1:-1], str(tmp_path / "attacked")]) == 0  # as pasted, but for the folder
    assert (tmp_path / "attacked/scene.png").is_file()
