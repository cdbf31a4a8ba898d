"""The commands on networks in the forms that users bring them in."""

import sys

import pytest
import torch
from command_line import attack, record, refused
from PIL import Image

from dagcore import DAG, victims
from dagcore.__main__ import main

SIZE = (32, 24)
VICTIMS = """
import warnings

import torch
from torch import nn
from dagcore import victims

IMAGES = torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(0))

def net(classes=4):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, classes, 3, 1, 1)
    return nn.Sequential(*layers).eval()

def weight_norm():
    made = net()
    made[0] = torch.nn.utils.weight_norm(made[0])
    return made

def parametrized():
    made = net()
    made[0] = torch.nn.utils.parametrizations.weight_norm(made[0])
    return made

def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # some versions of torch warn
        return torch.jit.script(net())

def frozen():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.freeze(scripted())

def exported():
    return torch.export.export(net(), (IMAGES,)).module()

def half():
    return net().half()

def double():
    return net().double()

def inference():
    with torch.inference_mode():
        return net()

class Form(nn.Module):
    def __init__(self, form, classes=4):
        super().__init__()
        self.net, self.form = net(classes), form

    def forward(self, images):
        return self.form(self.net(images))

def a_tuple():
    return Form(lambda scores: (scores, scores.mean((2, 3))))

def two_maps():
    return Form(lambda scores: (scores, scores))

def a_list():
    return Form(lambda scores: [scores, scores, scores])

def a_dict():
    return Form(lambda scores: {"masks": scores})

def classes_last():
    return Form(lambda scores: scores.permute(0, 2, 3, 1))

def one_logit():
    return net(1)

def two_classes():
    return victims.binary(Form(lambda scores: scores * 0.7, 1))

class OneSize(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.net, self.error = net(), error

    def forward(self, images):
        if images.shape[2:] != (16, 20):
            raise self.error("wants 16 x 20")
        return self.net(images)

def one_size():
    return OneSize(ValueError)

def sized():
    return victims.Victim(OneSize(RuntimeError), size=(16, 20))
"""
ATTACKED = (
    *("weight_norm", "parametrized", "scripted", "frozen", "exported", "half", "double"),
    *("inference", "a_tuple", "two_classes", "sized"),
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with one image and the networks."""
    (tmp_path / "forms_victim.py").write_text(VICTIMS)
    (tmp_path / "photos").mkdir()
    levels = (torch.rand(24, 32, 3, generator=torch.Generator().manual_seed(1)) * 255).byte()
    Image.fromarray(levels.numpy()).save(tmp_path / "cat.png")
    Image.fromarray(levels.numpy()).save(tmp_path / "photos" / "cat.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "forms_victim", raising=False)
    return tmp_path


def run(form, *options):
    given = ["--data", "photos", "--max-iter", "1", "--figures", "0", "--out", "run", *options]
    return main(["run", "--model", f"forms_victim:{form}", *given])


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("form", ATTACKED)
def test_attacked(folder, form):
    assert attack("--max-iter", 1, "--adversarial", "runner-up", model=f"forms_victim:{form}") == 0
    numbers = record("cat")
    assert numbers["num_classes"] == (2 if form == "two_classes" else 4)
    assert numbers["active"][0] == numbers["targets"] == 24 * 32
    assert numbers["iterations"] == 1
    assert run(form) == 0


REFUSED = [
    ("two_maps", "got tuple of 2: (1, 4, "),
    ("a_list", "got list of 3: (1, 4, "),
    ("a_dict", "got dict of 1: 'masks': (1, 4, "),
    ("classes_last", "got the classes last, (1, 24, 32, 4): return scores.permute(0, 3, 1, 2)"),
    ("one_logit", "at least 2 classes, got (1, 1, 24, 32): dagcore.victims.binary(model)"),
    ("one_size", "--size WIDTHxHEIGHT resizes images for a network that takes one size"),
]


@pytest.mark.parametrize(("form", "message"), REFUSED)
def test_refused_in_one_line(folder, capsys, form, message):
    assert message in refused(capsys, model=f"forms_victim:{form}")
    for options in ((), ("--no-prepare",)):
        assert run(form, *options) == 2
        error = capsys.readouterr().err
        assert message.removesuffix(")") in error
        assert error.count("dagcore run: error: ") == 1
        assert "Traceback" not in error
        advised = "--no-prepare" in error
        assert advised == (form == "one_size" and not options)


def test_a_size_for_a_network_of_one_size(folder, capsys):
    options = ("--size", "20x16", "--max-iter", 1, "--adversarial", "runner-up")
    assert attack(*options, model="forms_victim:one_size") == 0
    numbers = record("cat")
    assert numbers["size"] == "20x16"
    assert numbers["label_map"] == [24, 32]
    with Image.open("out/cat.png") as image:
        assert image.size == SIZE
    assert run("one_size", "--size", "20x16") == 0
    assert 'size = "20x16"' in (folder / "run" / "settings.toml").read_text()
    (folder / "run.toml").write_text('size = "20x16"\n')
    assert run("one_size", "--config", "run.toml") == 0
    capsys.readouterr()
    assert run("one_size", "--size", "16x20", "--no-prepare") == 2
    assert "size was '20x16' and is '16x20'" in capsys.readouterr().err
    error = refused(capsys, "--size", "20", model="forms_victim:one_size", out="no")
    assert "size must be WIDTHxHEIGHT, such as 512x384, got '20'" in error
    error = refused(capsys, "--size", "20x16", model="FR-ZF-07", out="no")
    assert "a detector that resizes images itself" in error


def test_a_network_made_in_inference_mode_says_how_to_attack_it(folder):
    import forms_victim

    images, labels = forms_victim.IMAGES, torch.ones(1, 24, 32).long()
    model = forms_victim.inference()
    with pytest.raises(ValueError, match=r"under torch.inference_mode.*copy.deepcopy\(model\)"):
        DAG(max_iter=1)(model, images, labels)
    for able in (victims.prepare(model), victims.load("forms_victim:inference")):
        DAG(max_iter=1)(able, images, labels)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("form", ["frozen", "exported", "scripted"])
def test_graphs_are_left_as_they_were(folder, form):
    import forms_victim

    model = getattr(forms_victim, form)()
    before = {name: getattr(m, "training", False) for name, m in model.named_modules()}
    DAG(max_iter=1)(model, forms_victim.IMAGES, torch.ones(1, 24, 32).long())
    assert before == {name: getattr(m, "training", False) for name, m in model.named_modules()}
