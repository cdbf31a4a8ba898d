"""`dagcore evaluate`: protocols, what each attack leaves, the worst case, and what is kept."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import dagcore
from dagcore import APGD, DAG, PGD, CosPGD
from dagcore.__main__ import main
from dagcore.data import Scenes
from dagcore.evaluation import validity
from dagcore.evaluation.protocols import PROTOCOLS, Entry, Protocol, find_protocol
from dagcore.evaluation.robustness import warnings_of, worst_cases
from dagcore.losses import Loss
from dagcore.metrics import worst_iou
from dagcore.perturbation import round_to_8_bits
from dagcore.seeds import seed_of
from dagcore.zoo import load

# Half of the balls here are none that files resolve; that they are told of is a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore:rounding to 8 bits may lead out")

CLASSES = 4
EPSILON = (1 / 255, 4 / 255)
SHORT = Protocol(
    name="short",
    attacks=(
        Entry(
            name="MCE-bal",
            attack="apgd",
            class_weights="balanced",
            settings={"loss": "masked-cross-entropy", "steps": 6, "radii": "shrinking"},
        ),
        Entry(name="CosPGD", attack="cospgd", settings={"steps": 5, "alpha": 1 / 255}),
        Entry(
            name="PGD L2",
            attack="pgd",
            epsilon=(0.5,),
            settings={"norm": "l2", "steps": 4, "alpha": 0.2},
        ),
    ),
    epsilon=EPSILON,
)


def network() -> nn.Module:
    """Kinds of local contrast, of which an attack can make any of any other."""
    net = nn.Conv2d(3, CLASSES, 3, padding=1, bias=False)
    weight = torch.randn(net.weight.shape, generator=torch.Generator().manual_seed(0))
    net.weight.data = weight - weight.mean((1, 2, 3), keepdim=True)
    return net


def examples(count: int = 5, size: tuple[int, int] = (12, 17)):
    """Images with what the network sees in a noisy copy for labels, some of them void."""
    rng = torch.Generator().manual_seed(7)
    found = []
    for _ in range(count):
        image = torch.randint(256, (3, *size), generator=rng).float() / 255
        noise = 0.05 * torch.randn(image.shape, generator=rng)
        with torch.no_grad():
            labels = network()((image + noise)[None])[0].argmax(0)
        labels[0, :3] = 255
        found.append((image, labels))
    return found


def counts(net, image, labels):
    """Pixels rightly seen, seen, and true, of each class."""
    with torch.no_grad():
        seen = net(image[None])[0].argmax(0)
    counted = labels != 255
    seen, labels = seen[counted], labels[counted]
    table = [torch.bincount(x, minlength=CLASSES) for x in (seen[seen == labels], seen, labels)]
    return torch.stack(table, 1)


def scores(tables):
    """aAcc, mIoU and mAcc in percent, written out."""
    hits, seen, true = sum(tables).double().unbind(1)
    unions = seen + true - hits
    return (
        100 * float(hits.sum() / true.sum()),
        100 * float((hits / unions)[unions > 0].mean()),
        100 * float((hits / true)[true > 0].mean()),
    )


def measured(one):
    return one["aAcc"], one["mIoU"], one["mAcc"]


def evaluate(out, **settings):
    given = {"protocol": SHORT, "check": 0, **settings}
    return dagcore.evaluate(network(), examples(), out=out, **given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation") / "out"
    return out, evaluate(out)


def of(summary, attack, epsilon, stage, levels=None):
    (found,) = (
        one
        for one in summary["results"]
        if (one["attack"], one["epsilon"], one["stage"], one["levels"])
        == (attack, epsilon, stage, levels)
    )
    return found


def by_hand(attack, position):
    """What an attack leaves of every image in memory and in 8 bits."""
    net, tables = network(), {"memory": [], "file": []}
    for number, (image, labels) in enumerate(examples()):
        sample = dagcore.Sample(image, labels, "untargeted", seed=seed_of((0, number, position)))
        (result,) = attack.stream(net, [sample], 1)
        tables["memory"].append(counts(net, result.adversarial[0], labels))
        tables["file"].append(counts(net, round_to_8_bits(result.adversarial)[0], labels))
    return tables


def balanced():
    of_class = sum(counts(network(), image, labels)[:, 2] for image, labels in examples())
    weights = 1 / of_class.double()
    return (weights / weights.sum()).float()


def test_scores_are_those_of_each_attack_run_by_hand(whole):
    _, summary = whole
    clean = [counts(network(), *example) for example in examples()]
    assert measured(summary["clean"]) == pytest.approx(scores(clean))
    loss = Loss("masked-cross-entropy", class_weights=balanced())
    for epsilon in EPSILON:
        for position, (name, attack) in enumerate(
            {
                "MCE-bal": APGD(loss=loss, steps=6, radii="shrinking", epsilon=epsilon),
                "CosPGD": CosPGD(steps=5, alpha=1 / 255, epsilon=epsilon),
            }.items()
        ):
            for stage, tables in by_hand(attack, position).items():
                assert measured(of(summary, name, epsilon, stage)) == pytest.approx(scores(tables))
    for stage, tables in by_hand(PGD(norm="l2", epsilon=0.5, steps=4, alpha=0.2), 2).items():
        assert measured(of(summary, "PGD L2", 0.5, stage)) == pytest.approx(scores(tables))


def test_the_worst_case_is_that_of_all_attacks_in_a_ball(whole):
    out, summary = whole
    records = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    tables = torch.zeros(2, len(records), CLASSES, 3, dtype=torch.int64)
    for n, record in enumerate(records):
        cells = [c for c in record["cells"] if c["epsilon"] == EPSILON[1]]
        assert [cell["attack"] for cell in cells] == ["MCE-bal", "CosPGD"]
        for a, cell in enumerate(cells):
            for c, row in cell["memory"]["pixels"].items():
                tables[a, n, int(c)] = torch.tensor(row)
    (worst,) = (
        w for w in summary["worst_case"] if w["epsilon"] == EPSILON[1] and w["stage"] == "memory"
    )
    hits, seen, true = tables.unbind(3)
    least = hits.sum(2).min(0).values
    assert worst["aAcc"] == pytest.approx(100 * float(least.sum() / true[0].sum()))
    best = worst_iou(hits, seen, true[0]).score.mean
    assert worst["mIoU"] <= best + 1e-9
    for one in summary["results"]:
        for ball in summary["worst_case"]:
            if all(one[key] == ball[key] for key in ("norm", "epsilon", "levels", "stage")):
                assert ball["aAcc"] <= one["aAcc"] + 1e-9
                assert ball["mIoU"] <= one["mIoU"] + 1e-9
    assert sum(worst["images won, aAcc"].values()) == len(records)
    assert len(summary["worst_case"]) == 6  # three balls, in memory and in 8 bits


def test_accuracy_falls_with_the_radius_and_with_steps(whole):
    _, summary = whole
    for name in ("MCE-bal", "CosPGD"):
        small, large = (of(summary, name, epsilon, "memory") for epsilon in EPSILON)
        assert summary["clean"]["aAcc"] > small["aAcc"] > large["aAcc"]
        shares = list(large["correct_by_step"].values())
        assert shares == sorted(shares, reverse=True)
        assert shares[-1] == pytest.approx(large["aAcc"])
    assert list(of(summary, "CosPGD", EPSILON[0], "memory")["correct_by_step"]) == list("01235")
    # SEA tells of the last of its shrinking balls alone: 2 of its 6 steps are in it.
    assert list(of(summary, "MCE-bal", EPSILON[0], "memory")["correct_by_step"]) == list("45678")


def test_the_folder_holds_the_worst_example_of_each_image(whole):
    out, _ = whole
    records = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    for record, (image, labels) in zip(records, examples(), strict=True):
        pixels = np.array(Image.open(out / "images" / f"{record['name']}.png"))
        kept = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
        right = [sum(row[0] for row in cell["file"]["pixels"].values()) for cell in record["cells"]]
        assert record["worst"]["correct"] == min(right)
        assert int(counts(network(), kept, labels)[:, 0].sum()) == min(right)
        assert float((kept - image).abs().max()) > 0


def test_passes_are_counted(tmp_path):
    passes = []
    net = network()
    net.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    settings = {"check": 0, "prepare": False, "figures": 0}
    summary = dagcore.evaluate(net, examples(2), SHORT, out=tmp_path / "out", **settings)
    cost = summary["cost"]
    told = cost["forward"] + cost["clean passes per image"] + cost["judging"]
    assert len(passes) == 2 * told
    assert sum(passes) == 2 * cost["forward"]
    assert cost["backward"] == cost["forward"] - 5  # none after the last of an attack in a ball


def test_an_evaluation_that_was_stopped_gives_the_same_bytes(whole, tmp_path):
    out, _ = whole

    class Stops:
        def __init__(self, after):
            self.left = after

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def begin(self, *_, **__):
            pass

        def watched(self, *_):
            pass

        def finished(self, *_, **__):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

        def summary(self, *_):
            pass

    again = tmp_path / "again"
    for after in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            evaluate(again, progress=Stops(after))
    assert not (again / "summary.json").exists()
    evaluate(again)
    assert contents(again) == contents(out)
    evaluate(again)  # nothing is done any more
    assert contents(again) == contents(out)


def contents(out):
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name not in ("speed.json", ".lock")
    }


def test_images_without_a_correct_pixel_are_not_attacked_again(tmp_path):
    radii = (0.6, 0.9)
    large_steps = Entry(name="CosPGD", attack="cospgd", settings={"steps": 20, "alpha": 0.2})
    own = dataclasses.replace(SHORT, attacks=(large_steps,))
    skipped = evaluate(tmp_path / "skipped", protocol=own, epsilon=radii)
    every = evaluate(tmp_path / "every", protocol=own, epsilon=radii, skip_fooled=False)
    small, large = (of(skipped, "CosPGD", e, "memory") for e in radii)
    assert small["examples_of_smaller_balls"] == 0
    assert large["examples_of_smaller_balls"] > 0
    assert large["forward"] < of(every, "CosPGD", radii[1], "memory")["forward"]
    assert of(every, "CosPGD", radii[1], "memory")["examples_of_smaller_balls"] == 0
    assert of(every, "CosPGD", radii[0], "memory") == small
    assert large["aAcc"] <= small["aAcc"]


def test_both_levels_attack_memory_and_files(tmp_path, whole):
    own = dataclasses.replace(SHORT, attacks=SHORT.attacks[1:2])
    both = evaluate(tmp_path / "out", protocol=own, levels="both")
    for epsilon in EPSILON:
        of(both, "CosPGD", epsilon, "file", 256)
        alone = of(whole[1], "CosPGD", epsilon, "memory")
        assert of(both, "CosPGD", epsilon, "memory")["forward"] == alone["forward"]
    for line in (tmp_path / "out" / "images.jsonl").read_text().splitlines():
        for cell in json.loads(line)["cells"]:
            assert ("memory" in cell) == (cell["levels"] is None)


def test_the_network_is_as_it_was(tmp_path):
    net = network().train()
    net.add_module("norm", nn.BatchNorm2d(CLASSES))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    dagcore.evaluate(net, examples(2), SHORT, out=tmp_path / "out", check=0)
    assert net.training
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


class Counting(nn.Module):
    """A network that keeps a buffer of how often it was asked."""

    def __init__(self):
        super().__init__()
        self.network = network()
        self.register_buffer("asked", torch.zeros(()))

    def forward(self, x):
        self.asked += 1
        return self.network(x)


def test_a_network_that_changes_is_told_of(tmp_path):
    with pytest.warns(RuntimeWarning, match="Counting has changed its weights or buffers"):
        dagcore.evaluate(
            Counting(), examples(1), SHORT, out=tmp_path / "out", check=0, prepare=False
        )


class Rounding(nn.Module):
    def forward(self, x):
        return (8 * x).round() / 8


class Rounded(nn.Module):
    """A network with a part whose gradient is zero."""

    def __init__(self):
        super().__init__()
        self.fewer = Rounding()
        self.network = network()

    def forward(self, x):
        return self.network(self.fewer(x))


SOUND = Protocol(
    name="sound",
    attacks=(Entry(name="CosPGD", attack="cospgd", settings={"steps": 20, "alpha": 1 / 255}),),
    epsilon=4 / 255,
)


def test_what_is_unsound_is_in_the_report(tmp_path):
    sound = evaluate(tmp_path / "sound", protocol=SOUND, check=1)
    verdicts = {one["name"]: one["verdict"] for one in sound["checks"]}
    assert verdicts.pop("transfer-stronger") == "skipped"
    assert set(verdicts.values()) == {"passed"}
    with pytest.warns(RuntimeWarning, match="checks of the evaluation are flagged, .* zero-grad"):
        found = dagcore.evaluate(
            Rounded(), examples(1), SOUND, out=tmp_path / "out", check=1, prepare=False
        )
    flagged = {one["name"]: one["text"] for one in found["checks"] if one["verdict"] == "flagged"}
    assert "zero-gradient" in flagged
    assert "fewer" in flagged["non-differentiable"]
    assert "non-differentiable" in (tmp_path / "out" / "report.html").read_text()
    kept = json.loads((tmp_path / "out" / "checks.json").read_text())
    assert kept["findings"] == found["checks"]


def test_checks_that_were_made_are_kept(tmp_path, monkeypatch):
    found = evaluate(tmp_path / "out", protocol=SOUND, check=1)
    monkeypatch.setattr(validity, "check", None)
    assert evaluate(tmp_path / "out", protocol=SOUND, check=1)["checks"] == found["checks"]
    with pytest.raises(TypeError):
        evaluate(tmp_path / "out", protocol=SOUND, check=2)


def test_the_checks_are_of_the_protocols_own_attack(tmp_path):
    tiny = {"steps": 3, "alpha": 1e-6, "random_start": False}
    weak = dataclasses.replace(
        SOUND, attacks=(Entry(name="PGD", attack="pgd", settings=tiny),), name="weak"
    )
    with pytest.warns(RuntimeWarning, match="are flagged, .* unbounded-attack"):
        found = evaluate(tmp_path / "out", protocol=weak, check=1)
    with pytest.warns(RuntimeWarning, match="are flagged"):
        again = evaluate(tmp_path / "out", protocol=weak, check=2)
    assert again["checks"] != found["checks"]


def test_another_network_is_tried_for_transfer(tmp_path, monkeypatch):
    (tmp_path / "surrogates.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "def make(classes=4):\n    torch.manual_seed(0)\n"
        "    return nn.Conv2d(3, classes, 3, padding=1)\n\n"
        "def five():\n    return make(5)\n\ndef broken():\n    return lambda x: x[9]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = "surrogates:make"
    found = evaluate(tmp_path / "out", protocol=SOUND, check=1, surrogate=spec)
    verdicts = {one["name"]: one["verdict"] for one in found["checks"]}
    assert verdicts["transfer-stronger"] == "passed"
    for given, message in (
        ("nonsense", "^surrogate nonsense: model must be"),
        ("surrogates:five", "^surrogate must have 4 classes like model, .* has 5"),
        ("surrogates:broken", "^surrogate surrogates:broken failed with IndexError"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(tmp_path / "none", protocol=SOUND, surrogate=given)


def test_images_that_are_void_are_not_checked(tmp_path):
    (image, labels), *others = examples(3)
    data = [(image, torch.full_like(labels, 255)), *others]
    summary = dagcore.evaluate(network(), data, SOUND, out=tmp_path / "out", check=1)
    assert {one["verdict"] for one in summary["checks"]} == {"passed", "skipped"}


@pytest.mark.filterwarnings("ignore:CosPGD at 4/255 leaves")
def test_other_data_and_other_networks_are_refused(tmp_path):
    def negative(x):
        return -network()(x)

    out, data = tmp_path / "out", examples(2)
    with torch.no_grad():
        dagcore.evaluate(lambda x: network()(x), data, SOUND, out=out, check=0, prepare=False)
    with pytest.raises(ValueError, match="names and sizes of the images was"):
        dagcore.evaluate(lambda x: network()(x), data[::-1], SOUND, out=out, check=0, prepare=False)
    with pytest.raises(ValueError, match="first image was"):
        dagcore.evaluate(negative, data, SOUND, out=out, check=0, prepare=False)
    again = Scenes("07", "train", count=1)
    dagcore.evaluate(load("FCN-Alex"), again, SOUND, out=tmp_path / "scenes", check=0)
    again = Scenes("07", "test", count=1)
    with pytest.raises(ValueError, match="names and sizes of the images was"):
        dagcore.evaluate(load("FCN-Alex"), again, SOUND, out=tmp_path / "scenes", check=0)


class Threshold(nn.Module):
    """Two classes, by whether an image is lighter than a level that no file has."""

    def forward(self, x):
        lighter = (x.mean(1, keepdim=True) - 100.6 / 255) * 200
        return torch.cat([lighter, -lighter], 1)


def test_what_is_fooled_in_memory_alone_is_attacked_again(tmp_path):
    image = torch.full((3, 6, 6), 101 / 255)
    pgd = Entry(name="PGD", attack="pgd", settings={"steps": 10})
    own = dataclasses.replace(SOUND, attacks=(pgd,), epsilon=(0.45 / 255, 4 / 255))
    data = [(image, torch.zeros(6, 6, dtype=torch.long))]
    settings = {"check": 0, "prepare": False}
    with pytest.warns(RuntimeWarning, match="are lost when images are rounded"):
        found = dagcore.evaluate(Threshold(), data, own, out=tmp_path / "out", **settings)
    small, large = own.balls
    assert of(found, "PGD", small, "memory")["aAcc"] == 0
    assert of(found, "PGD", small, "file")["aAcc"] == 100
    assert of(found, "PGD", large, "file")["aAcc"] == 0


def test_the_last_iterate_counts_where_a_protocol_says_so(tmp_path):
    wild = {"steps": 6, "alpha": 0.5}
    both = tuple(
        Entry(name=returns, attack="pgd", returns=returns, settings=wild)
        for returns in ("best", "last")
    )
    own = dataclasses.replace(SOUND, attacks=both, epsilon=0.1)
    summary = evaluate(tmp_path / "out", protocol=own)
    tables = []
    for number, (image, labels) in enumerate(examples()):
        sample = dagcore.Sample(image, labels, "untargeted", seed=seed_of((0, number, 1)))
        attack = PGD(**wild, epsilon=0.1)
        (result,) = attack.stream(network(), [sample], 1)
        tables.append(counts(network(), result.last[0], labels))
    assert measured(of(summary, "last", 0.1, "memory")) == pytest.approx(scores(tables))
    assert of(summary, "best", 0.1, "memory")["aAcc"] < scores(tables)[0]
    assert "correct_by_step" not in of(summary, "last", 0.1, "memory")


def test_the_search_for_the_worst_case_is_begun_with_each_attack():
    hits = [[[0, 2], [4, 0]], [[3, 0], [0, 3]]]  # attacks x images x classes
    seen = [[[0, 5], [7, 1]], [[5, 0], [0, 8]]]
    true = [[3, 2], [5, 3]]
    records = [
        {
            "cells": [
                {
                    **{"attack": f"{a}", "norm": "linf", "epsilon": 0.1, "levels": 256},
                    "file": {
                        "pixels": {
                            f"{c}": [hits[a][n][c], seen[a][n][c], true[n][c]] for c in range(2)
                        }
                    },
                }
                for a in range(2)
            ]
        }
        for n in range(2)
    ]
    given = [torch.tensor(one) for one in (hits, seen, true)]
    each = [worst_iou(*given, begin=begin).score.mean for begin in (0, 1)]
    assert each == pytest.approx([26.923, 19.231], abs=1e-3)  # the second is the true one
    (found,) = worst_cases(records, ["0", "1"])
    assert found["mIoU"] == pytest.approx(each[1])


def test_slots_give_the_scores_of_images_alone(whole, tmp_path):
    together = evaluate(tmp_path / "out", slots=3)
    for one, other in zip(whole[1]["results"], together["results"], strict=True):
        assert measured(one) == pytest.approx(measured(other), abs=0.5)


def test_dag_has_no_ball(tmp_path):
    summary = evaluate(tmp_path / "out", protocol="dag-2017")
    (found,) = (one for one in summary["results"] if one["stage"] == "memory")
    assert (found["attack"], found["epsilon"], found["norm"]) == ("DAG", None, None)
    assert found["aAcc"] < summary["clean"]["aAcc"] - 20
    with pytest.raises(ValueError, match="epsilon must not be given for dag-2017, which"):
        evaluate(tmp_path / "other", protocol="dag-2017", epsilon=0.1)


def test_detectors_under_togs_goals(tmp_path):
    summary = dagcore.evaluate(
        load("FR-ZF-07"),
        Scenes("07", "test", count=2, first=2),
        "detection-tog-2020",
        out=tmp_path / "out",
        check=0,
    )
    goals = ["vanish", "mislabel", "fabricate", "untargeted"]
    assert [one["attack"] for one in summary["results"][::2]] == goals
    clean, left = summary["clean"], {goal: of(summary, goal, 8 / 255, "memory") for goal in goals}
    assert clean["mAP"] > 50
    for goal in ("vanish", "mislabel", "untargeted"):
        assert left[goal]["mAP"] < clean["mAP"] - 30
    assert left["vanish"]["errors"]["missed"] > clean["errors"]["missed"]
    assert left["mislabel"]["errors"]["classification"] > clean["errors"]["classification"]
    assert left["fabricate"]["errors"]["background"] > clean["errors"]["background"]


def test_other_settings_are_refused(whole):
    out, _ = whole
    with pytest.raises(ValueError, match="results of other settings: seed was 0 and is 1"):
        evaluate(out, seed=1)
    with pytest.raises(ValueError, match="name of the protocol was 'short' and is 'cospgd-2024'"):
        evaluate(out, protocol="cospgd-2024")
    attacks = [dataclasses.replace(SHORT.attacks[0], name="other"), *SHORT.attacks[1:]]
    with pytest.raises(ValueError, match="digest of the protocol was"):
        evaluate(out, protocol=dataclasses.replace(SHORT, attacks=tuple(attacks)))


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "maps").mkdir()
    for k, (image, labels) in enumerate(examples(2)):
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{k}.png")
        Image.fromarray(labels.byte().numpy()).save(tmp_path / "maps" / f"{k}.png")
    (tmp_path / "photos" / "broken.png").write_text("broken")
    (tmp_path / "own.toml").write_text(
        'name = "own"\nepsilon = ["1/255", 0.02]\n[[attacks]]\nname = "PGD-3"\nattack = "pgd"\n'
        'steps = 3\nalpha = "1/255"\n'
    )
    (tmp_path / "evaluated_victim.py").write_text(
        "import torch\nfrom torch import nn\n\ndef make():\n"
        "    torch.manual_seed(0)\n    return nn.Conv2d(3, 4, 3, padding=1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    command = ["evaluate", "--data", "photos", "--labels", "maps", "--protocol", "own.toml"]
    command += ["--model", "evaluated_victim:make", "--out", "out", "--check", "0"]
    assert main(command) == 0
    told = capsys.readouterr()
    assert "PGD-3" in told.out
    assert "worst case" in told.out
    assert "0.02, in memory" in told.out
    assert "broken: passed over" in told.err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["images"], summary["evaluated"]) == (3, 2)
    assert [one["epsilon"] for one in summary["results"][::2]] == [1 / 255, 0.02]
    assert main([*command, "--epsilon", "2/255"]) == 2
    assert "epsilon was not set and is [0.00784" in capsys.readouterr().err


def test_images_without_labels_are_warned_of(tmp_path):
    pairs = [(image, None) for image, _ in examples(2)]
    with pytest.warns(RuntimeWarning, match="2 of 2 images have no labels"):
        summary = dagcore.evaluate(
            network(), pairs, dataclasses.replace(SHORT), out=tmp_path / "out", check=0
        )
    assert summary["clean"]["aAcc"] == 100


def warned(**changes):
    one = {"attack": "PGD", "norm": "linf", "levels": None, "stage": "memory", "iterations": 20}
    other = {"epsilon": 1 / 255, "aAcc": 40.0, "correct_by_step": {0: 90.0, 10: 41.0, 20: 40.0}}
    results = [{**one, **other}, {**one, **other, "epsilon": 2 / 255, **changes}]
    return warnings_of([], {"task": "segmentation", "results": results})


def test_results_that_contradict_each_other_are_told():
    assert warned(aAcc=30.0) == []
    assert warned(aAcc=40.5) == []
    (rising,) = warned(aAcc=45.0)
    assert rising.startswith("PGD leaves 45.0 % of the pixels correct at 2/255 and 40.0 % at 1/255")
    (unfinished,) = warned(correct_by_step={0: 90.0, 5: 60.0, 14: 47.0, 20: 40.0})
    assert (
        "PGD at 2/255 leaves 60.0 % of the pixels correct after 5 updates and 40.0 %" in unfinished
    )
    (lost,) = warned(epsilon=0.25 / 255, stage="file")
    assert "(0.25/255) are lost when images are rounded" in lost
    (left,) = warned(epsilon=0.03, stage="file")
    assert "may lead out of balls of radius 0.03: --levels 256" in left
    assert "radius 2.5 in L2" in warned(norm="l2", epsilon=2.5, stage="file")[0]
    assert warned(epsilon=3 / 255, stage="file") == []
    (large,) = warned(epsilon=4.0)
    assert large == "a radius of 4 allows any image: is /255 missing?"


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (3, "dataset must be a name, a folder or a sequence of examples, got int"),
        ({"a": 1}, "dataset must be a name, a folder or a sequence of examples, got dict"),
        ([], "dataset must have at least one example, got none"),
        (
            [(torch.zeros(3, 4, 4), torch.full((4, 4), -2))],
            r"label map of dataset\[0\] must not hold classes below 0 \(255 is ignored\), got -2",
        ),
        ([(torch.full((3, 4, 4), 7.0), None)], "images must lie within bounds"),
        ([torch.zeros(3, 4, 4)], r"dataset\[0\] must be .* a pair \(image, truth\), got Tensor"),
        ([(torch.zeros(4, 4), None)], r"image of dataset\[0\] must have shape \(3, H, W\)"),
        ([(torch.zeros(3, 4, 4), torch.zeros(4, 4))], r"label map of dataset\[0\] must be uint8"),
    ],
)
def test_data_that_are_none(dataset, message, tmp_path):
    with pytest.raises((TypeError, ValueError), match=message):
        dagcore.evaluate(network(), dataset, SHORT, out=tmp_path / "out", check=0)


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        (torch.zeros(4, 4), "must have 'boxes' and 'labels', got Tensor"),
        ({"boxes": torch.zeros(0, 4)}, r"'boxes' and 'labels', got dict of \['boxes'\]"),
        ({"boxes": [[0, 0, 1, 1]], "labels": torch.tensor([1])}, "'boxes' of .* got list"),
    ],
)
def test_truth_that_is_none_of_a_detectors(truth, message, tmp_path):
    data = [(torch.zeros(3, 128, 160), truth)]
    settings = {"protocol": "detection-tog-2020", "out": tmp_path / "out", "check": 0}
    with pytest.raises((TypeError, ValueError), match=message):
        dagcore.evaluate(load("FR-ZF-07"), data, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": "maps"}, "labels requires a network or a data set that is given by name"),
        ({"size": "8x8"}, "size requires a network or a data set that is given by name"),
        ({"protocol": 3}, "protocol must be a name, a TOML file or a Protocol, got int"),
        ({"epsilon": -1}, "epsilon must be a finite number above 0, got -1"),
        ({"epsilon": []}, "epsilon must have at least one radius, got none"),
        ({"levels": "8"}, "levels must be 'none', '256' or 'both', got '8'"),
        ({"stepps": 3}, "'stepps' is not a setting"),
    ],
)
def test_settings_that_are_none(settings, message, tmp_path):
    with pytest.raises((TypeError, ValueError), match=message):
        evaluate(tmp_path / "out", **settings)


def test_a_model_that_is_none(tmp_path):
    with pytest.raises(TypeError, match="model must be a name or a callable, got 3"):
        dagcore.evaluate(3, examples(1), SHORT, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attack": "dag", "adversarial": "untargeted"}, "adversarial_labels must be"),
        ({"attack": "pgd", "adversarial": "runner-up"}, "adversarial_labels must be"),
        ({"attack": "pgd", "adversarial": "vanish"}, "adversarial_labels must be"),
        ({"attack": "pgd", "task": "detection"} | {"adversarial": "random"}, "must be 'vanish'"),
        ({"attack": "dag", "task": "detection", "adversarial": "fabricate"}, "must be 'permu"),
        ({"attack": "pgd", "epsilon": 0}, "epsilon must be a finite number above 0"),
    ],
)
def test_entries_that_could_never_run(settings, message):
    with pytest.raises(ValueError, match=message):
        Entry(name="a", **settings)


def test_dag_has_a_ball_where_it_is_given_a_radius():
    entry = Entry(name="DAG", attack="dag", epsilon=0.02)
    assert entry.build(0.02) == DAG(epsilon=0.02, ignore_index=-1)
    assert Protocol(name="own", attacks=(entry,), epsilon=0.3).radii(entry) == (0.02,)


def test_users_radii_need_an_attack_in_the_protocols_norm(tmp_path):
    own = Protocol(name="own", attacks=SHORT.attacks[2:])
    with pytest.raises(ValueError, match="which has no attack in its norm, linf"):
        evaluate(tmp_path / "out", protocol=own, epsilon=0.1)


# ---- protocols


def test_sea_is_three_losses_in_shrinking_balls():
    sea = PROTOCOLS["sea-2024"]
    assert sea.epsilon == (4 / 255, 8 / 255)
    assert [(e.name, e.settings["loss"], e.class_weights) for e in sea.attacks] == [
        ("MCE-bal", "masked-cross-entropy", "balanced"),
        ("MCE", "masked-cross-entropy", None),
        ("JS", "jensen-shannon", None),
    ]
    for entry in sea.attacks:
        attack = entry.build(8 / 255)
        assert attack.phases == ((90, 16 / 255), (90, 12 / 255), (120, 8 / 255))
        assert (attack.track, attack.random_start, attack.norm) == ("cross-entropy", True, "linf")
        assert attack.schedule().max_iter + 1 == 303  # evaluations: 909 of all three


def test_the_other_protocols():
    bench = PROTOCOLS["semsegbench-2025"]
    built = [(entry, entry.build(1.0)) for entry in bench.attacks]
    known = [(e.name, attack.alpha, attack.steps, *bench.radii(e)) for e, attack in built]
    assert known == [
        *((name, 0.01, 20, 8 / 255) for name in ("PGD", "SegPGD", "CosPGD")),
        *((name, 0.1, 20, 64 / 255) for name in ("PGD L2", "SegPGD L2", "CosPGD L2")),
    ]
    assert [e.norm for e in bench.attacks] == ["linf"] * 3 + ["l2"] * 3
    assert bench.radii(bench.attacks[3], (0.5,)) == (64 / 255,)  # users give L-infinity's
    cospgd = PROTOCOLS["cospgd-2024"]
    assert cospgd.epsilon == (0.03,)
    assert sorted({e.build(0.03).steps for e in cospgd.attacks}) == [3, 5, 10, 20, 40, 100]
    assert {e.build(0.03).alpha for e in cospgd.attacks} == {0.01}
    tog = PROTOCOLS["detection-tog-2020"].attacks_for("detection")
    assert [e.adversarial for e in tog] == ["vanish", "mislabel", "fabricate", "untargeted"]
    assert {(e.build(1.0).alpha, e.build(1.0).steps) for e in tog} == {(2 / 255, 10)}
    (dag,) = PROTOCOLS["dag-2017"].attacks_for("detection")
    assert dag.build(None) == DAG(gamma=0.5 / 255, max_iter=150, ignore_index=-1)
    with pytest.raises(ValueError, match="sea-2024 must have attacks for detection, it has none"):
        PROTOCOLS["sea-2024"].attacks_for("detection")


def test_a_protocol_of_ones_own(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(
        'name = "own-2026"\ntitle = "Mine"\nepsilon = ["1/255", 0.01]\n'
        '[[attacks]]\nname = "a"\nattack = "pgd"\nalpha = "0.5/255"\nmomentum = 0.9\n'
        '[[attacks]]\nname = "b"\nattack = "apgd"\nloss = "dlr"\nnorm = "l2"\nepsilon = 2\n'
    )
    own = find_protocol(path)
    assert (own.name, own.title) == ("own-2026", "Mine")
    first, second = own.attacks
    assert own.radii(first) == (1 / 255, 0.01)
    assert own.radii(second, (0.3,)) == (2.0,)
    assert first.build(0.01) == PGD(alpha=0.5 / 255, momentum=0.9, epsilon=0.01, ignore_index=-1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epsilon = 1", "name must be given"),
        ('name = "a"', "attacks must be given"),
        ('name = "sea-2024"\nattacks = []', "name must not be that of another protocol"),
        ('name = "a"\nattacks = []', "attacks must have at least one entry, got none"),
        ('name = "a"\nattacks = 3', r"attacks must be tables \[\[attacks\]\], got 3"),
        ('name = "a"\nsteps = 3\nattacks = []', "'steps' is not a setting of a protocol"),
        ('name = "a"\n[[attacks]]\nattack = "pgd"', "attacks must each have a name, got None"),
        ('name = "a"\n[[attacks]]\nname = "b"', "b must have an attack, of dag"),
        ('name = "a"\n[[attacks]]\nname = "b"\nattack = "x"', "attack must be 'dag'"),
        (
            'name = "a"\n[[attacks]]\nname = "b"\nattack = "pgd"\nstepps = 3',
            "attacks: b: 'stepps' is not a setting of pgd; it has name",
        ),
        (
            'name = "a"\n[[attacks]]\nname = "b"\nattack = "pgd"\nalpha = -1',
            "attacks: b: alpha must be a finite number above 0",
        ),
        (
            'name = "a"\n[[attacks]]\nname = "b"\nattack = "pgd"\nnorm = "l2"',
            "attacks: b must have an epsilon in the norm l2",
        ),
        (
            'name = "a"\n' + 2 * '[[attacks]]\nname = "b"\nattack = "pgd"\n',
            "attacks must have different names, two are called 'b'",
        ),
        (
            'name = "a"\n[[attacks]]\nname = "b"\nattack = "cospgd"\nclass_weights = "balanced"',
            "class_weights require a loss by name",
        ),
    ],
)
def test_faults_of_a_protocol_are_named(tmp_path, text, message):
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises((TypeError, ValueError), match=message):
        find_protocol(path)


def test_protocols_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"protocol must be one of sea-2024, .* got sea-2023"):
        find_protocol("sea-2023")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_protocol(tmp_path / "none.toml")
