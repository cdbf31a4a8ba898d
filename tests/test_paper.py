"""The paper's experiments: perturbations kept and used again, diagnoses."""

import base64
import hashlib
import json
import time
from functools import partial

import killing
import pytest
import skimage.data
import torch
from PIL import Image
from safetensors.torch import load_file

from dagcore import zoo
from dagcore.__main__ import main
from dagcore.cli.progress import Counter
from dagcore.data import VOC_CLASSES, Scenes
from dagcore.paper import (
    Attack,
    Perturbation,
    Setup,
    cells,
    diagnoses,
    fancy,
    page,
    reading,
    tables,
    work,
)
from dagcore.perturbation import combine
from dagcore.zoo.checkpoint import save_weights

ZF = Attack.of("FR-ZF-07", max_iter=8)


def made(setup, *attacks):
    attacks = attacks or [ZF]
    with Counter() as counter:
        work.make_perturbations(setup, attacks, counter)
    return {attack: work.read_all(setup, attack) for attack in attacks}


def written(folder, *endings):
    """When each file of some kinds was written last."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.suffix in endings}


def test_perturbations_are_made_once_and_kept(tmp_path):
    setup = Setup(out=tmp_path, images=3, jobs=1)
    records = made(setup)[ZF]
    assert [record.key for record in records] == [s.key for s in Scenes("07", "test", count=3)]
    assert [record.targets > 0 for record in records] == [False, True, True]
    for record in records[1:]:
        assert record.values.shape == (3, 128, 160)
        assert 0 < record.perceptibility < 0.1
        assert record.iterations == len(record.active) - 1 <= 8
        assert record.active[0] > record.active[-1]
        assert record.targets >= record.active[0]
        assert record.proposals > record.targets

    before = written(tmp_path, ".safetensors")
    again = made(setup)[ZF]
    assert written(tmp_path, ".safetensors") == before
    assert all(torch.equal(a.values, b.values) for a, b in zip(records, again, strict=True))
    path = work.path_of(setup, ZF, 1)
    path.unlink()
    made(setup)
    after = written(tmp_path, ".safetensors")
    assert {p for p in after if after[p] != before[p]} == {path}


def test_what_is_missing_is_made_the_same_again(tmp_path, capsys):
    whole = made(Setup(out=tmp_path / "a", images=7, jobs=2))[ZF]  # two processes, two chunks
    setup = Setup(out=tmp_path / "b", images=7, jobs=1)
    made(Setup(out=tmp_path / "b", images=2, jobs=1))
    parts = made(setup)[ZF]
    for one, other in zip(whole, parts, strict=True):
        assert one.key == other.key
        assert one.active == other.active
        torch.testing.assert_close(one.values, other.values, rtol=0, atol=1e-5)
    assert "7/7" in capsys.readouterr().err
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]


def test_results_of_other_settings_are_refused(tmp_path):
    made(Setup(out=tmp_path, images=1, jobs=1))
    with pytest.raises(
        ValueError, match=r"--out: .*has results of other settings: seed was 0 and is 1"
    ):
        made(Setup(out=tmp_path, images=1, jobs=1, seed=1))


def test_attacks_of_other_rules_lie_apart():
    assert Attack.of("FCN-VGG*").folder == "fcn-vgg-star"
    assert Attack.of("FCN-VGG").max_iter == 200
    assert Attack.of("FR-ZF-07").max_iter == 150
    assert Attack.of("FR-ZF-07", nms_threshold=0.5).folder == "fr-zf-07-nms_threshold=0.5"
    assert ZF.folder == "fr-zf-07-max_iter=8"


def test_segmentation_aims_at_the_true_mask(tmp_path):
    setup = Setup(out=tmp_path, images=1, jobs=1)
    attack = Attack.of("FCN-Alex", max_iter=2)
    (record,) = made(setup, attack)[attack]
    mask = Scenes("07", "test", count=1)[0].mask
    assert record.targets == record.proposals == int((mask != 255).sum())
    clean = work.score(setup, "FCN-Alex").mean
    attacked = work.score(setup, "FCN-Alex", [(record.key, record.values)]).mean
    assert attacked < clean


def test_own_weights(tmp_path):
    setup = Setup(out=tmp_path / "out", images=1, jobs=1, weights=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"fr-zf-07\.safetensors or \.pth does not exist"):
        made(setup)


def a_record(active, targets=10):
    return Perturbation(
        key="k",
        values=torch.zeros(3, 2, 2),
        iterations=len(active) - 1,
        status="converged",
        active=active,
        targets=targets,
        proposals=20,
        perceptibility=0.0,
    )


def test_active_shares():
    records = [a_record([10, 5, 0]), a_record([8, 8, 4, 2], targets=20)]
    assert diagnoses.active_shares(records, 4) == pytest.approx(
        [(1.0 + 0.4) / 2, (0.5 + 0.4) / 2, 0.1, 0.05, 0.05]
    )


def test_denseness_by_command(tmp_path, capfd):
    arguments = ["--images", "2", "--jobs", "1", "--max-iter", "20", "--out", str(tmp_path)]
    assert main(["paper", "figure", "denseness", "FR-ZF-07", *arguments]) == 0
    shown = capfd.readouterr().out
    known = json.loads((tmp_path / "denseness.json").read_text())
    settings = known["settings"]
    assert (settings["images"], settings["seed"], settings["data"]) == (2, 0, "scenes 2")
    assert [row["NMS threshold"] for row in known["rows"]] == [0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
    sparse, dense = known["rows"][0], known["rows"][-1]
    assert 0 < sparse["targets"] < dense["targets"] < dense["proposals"]
    assert sparse["proposals"] < dense["proposals"]
    assert 0 <= dense["mAP after the attack"] <= dense["mAP"] == sparse["mAP"]
    assert (tmp_path / "denseness.md").read_text() in shown
    with Image.open(tmp_path / "denseness.png") as picture:
        assert picture.format == "PNG"


def test_convergence_by_command(tmp_path, capfd):
    arguments = ["--images", "2", "--jobs", "1", "--out", str(tmp_path)]
    assert main(["paper", "figure", "convergence", "FR-ZF-07", *arguments]) == 0
    (row,) = json.loads((tmp_path / "convergence.json").read_text())["rows"]
    assert row["active"][0] > row["active"][-1]
    assert row["not converged, %"] in (0.0, 100.0)
    assert row["iterations"] == [row["updates"]]
    assert "| FR-ZF-07 | 1 |" in capfd.readouterr().out
    with Image.open(tmp_path / "convergence.png") as picture:
        assert picture.format == "PNG"


def test_perceptibility_by_command(tmp_path, capfd):
    arguments = ["--images", "3", "--jobs", "1", "--out", str(tmp_path)]
    assert main(["paper", "figure", "perceptibility", "FR-ZF-07", *arguments]) == 0
    (row,) = json.loads((tmp_path / "perceptibility.json").read_text())["rows"]
    records = work.read_all(Setup(out=tmp_path, images=3), Attack.of("FR-ZF-07"))
    records = [record for record in records if record.targets]
    assert len(records) == 2
    for record, value in zip(records, row["values"], strict=True):
        p = record.values.double().square().sum(0).mean().sqrt()
        assert value == pytest.approx(float(p), rel=1e-5)
    assert row["lowest"] == min(row["values"]) <= row["median"] <= max(row["values"])
    assert row["highest"] == max(row["values"])
    assert f"{row['perceptibility']:.2e}" in capfd.readouterr().out
    with Image.open(tmp_path / "perceptibility.png") as picture:
        assert picture.format == "PNG"


def test_fancy_by_command(tmp_path, capfd):
    arguments = ["paper", "figure", "fancy", "--images", "2", "--jobs", "1", "--max-iter", "2"]
    arguments += ["--out", str(tmp_path)]
    assert main(arguments) == 0
    shown = capfd.readouterr().out
    assert "| noise, prescribed to be an object | FCN-VGG |" in shown
    assert (tmp_path / "fancy.md").read_text() in shown
    with Image.open(tmp_path / "fancy" / "noise.png") as picture:
        assert picture.format == "PNG"
    assert main([*arguments[:3], "FCN-VGG", *arguments[3:]]) == 2
    assert "fancy takes no networks, it has its own, got FCN-VGG" in capfd.readouterr().err


def test_a_universal_row_has_one_perturbation_for_all_images(tmp_path):
    attack = Attack.of("FCN-Alex", max_iter=3, universal=4, epsilon=20 / 255)
    setup = Setup(out=tmp_path, images=2, jobs=1)
    one, other = made(setup, attack)[attack]
    assert one.key is None
    assert one.iterations == 3
    assert 0 < float(one.values.abs().max()) <= 3 * 0.5 / 255 * 1.001
    assert torch.equal(one.values, other.values)
    assert [p.name for p in tmp_path.rglob("*.safetensors")] == ["000000.safetensors"]
    assert attack.folder == "fcn-alex-epsilon=0.07843-max_iter=3-universal=4"
    # Made on images that are not among those of the tables.
    keys = {example.key for example in setup.examples("segmentation")}
    assert not keys & {example.key for example in setup.others("segmentation", 4)}
    added = cells.added(setup, cells.Cell("DL-VGG", (attack,)))
    score = work.score(setup, "FCN-Alex", added)
    added = [(None, one.values)] * 2
    assert score.mean == work.score(setup, "FCN-Alex", added).mean
    # It takes the upper left part of itself to a smaller image.
    larger = torch.nn.functional.pad(one.values, (0, 4, 0, 2))
    assert work.score(setup, "FCN-Alex", [(None, larger)] * 2).mean == score.mean


def test_the_papers_tables_are_whole():
    for table in tables.TABLES:
        assert set(map(len, table.published.values())) == {len(table.networks)}
        for row in table.rows:
            kind, networks = tables.parse(row)
            assert (kind in ("none", "own")) == (not networks)
    assert tables.parse("r5 + r7 (permuted)") == ("permuted", ["FCN-Alex", "FCN-VGG"])
    assert tables.parse("r5 + r7") == ("sum", ["FCN-Alex", "FCN-VGG"])
    assert tables.parse("r5") == ("single", ["FCN-Alex"])
    assert tables.parse("universal r7") == ("universal", ["FCN-VGG"])
    setup = Setup(out="unused")
    needed = {one for table in tables.TABLES for one in tables.sources(setup, table)}
    paper = [attack for attack in needed if attack.levels is None]
    assert sorted(len(attack.networks) for attack in paper) == ([1] * 21 + [2] * 4 + [3] * 4 + [4])
    own = {one for table in tables.TABLES for one in table.networks}
    assert {attack.networks for attack in needed if attack.levels} == {(name,) for name in own}
    assert {attack.levels for attack in needed} == {None, 256}
    assert {attack.margin for attack in needed} == {0.0, 2.0}
    assert [attack.networks for attack in needed if attack.universal] == [("FCN-VGG",)]
    assert tables.parse("joint r1 + r3") == ("joint", ["FR-ZF-07", "FR-VGG-07"])
    assert [a.networks for a in tables.attacks(setup, "joint r1 + r3", "FCN-VGG")] == [
        ("FR-ZF-07", "FR-VGG-07")
    ]
    assert [a.networks for a in tables.attacks(setup, "r1 + r3", "FCN-VGG")] == [
        ("FR-ZF-07",),
        ("FR-VGG-07",),
    ]
    (own,) = tables.attacks(setup, "own, margin 2, in 8 bits", "FR-ZF-07")
    assert (own.networks, own.margin, own.levels) == (("FR-ZF-07",), 2.0, 256)
    assert own.folder == "fr-zf-07-levels=256-margin=2"


def test_what_a_row_adds(tmp_path):
    setup = Setup(out=tmp_path, images=1, jobs=1, max_iter=1)
    row = "r5 + r7 (permuted)"
    (alex,), (vgg,) = made(setup, *tables.attacks(setup, row, "FCN-VGG")).values()
    summed = combine(alex.values, vgg.values)

    def added(row, network):
        return list(cells.added(setup, tables.cell(setup, row, network)))

    ((key, total),) = added("r5 + r7", "DL-VGG")
    assert key == alex.key
    assert torch.equal(total, summed)
    ((_, permuted),) = added(row, "DL-VGG")
    assert not torch.equal(permuted, total)
    assert torch.equal(permuted.flatten().sort().values, total.flatten().sort().values)
    ((_, again),) = added(row, "FCN-Alex")
    assert torch.equal(again, permuted)


def test_a_row_in_8_bits_is_measured_in_8_bits(tmp_path):
    setup = Setup(out=tmp_path, images=1, jobs=1, max_iter=20)
    (attack,) = tables.attacks(setup, "own, in 8 bits", "FCN-Alex")
    (one,) = made(setup, attack)[attack]
    image = setup.examples("segmentation")[0].image
    levels = (image + one.values) * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    assert int((one.values * 255).abs().max().round()) >= 1
    cell = tables.cell(setup, "own, in 8 bits", "FCN-Alex")
    cells.measure_cell(setup, cell)
    added = [(None, (one.values * 255).round() / 255 + 0.3 / 255)]  # rounded away again
    score = work.score(setup, "FCN-Alex", added, in_8_bits=True)
    assert cells.known(setup, cell) == pytest.approx(score.mean)
    clean = work.score(setup, "FCN-Alex", [(None, torch.zeros_like(one.values))])
    assert score.mean < clean.mean


def measured(setup, table):
    """A table's scores and, written, its record and its Markdown."""
    with Counter() as counter:
        scores = tables.measure(setup, table, counter)
    record, shown, *_ = scores.report().write(setup)
    return scores.rows, json.loads(record.read_text()), shown.read_text()


def test_a_table(tmp_path):
    small = tables.Table(
        "detection",
        ("FR-ZF-07", "FCN-Alex"),
        {"none": (58.7, 48.04), "r1": (3.61, 31.74), "r1 (permuted)": (58.3, 48.03)},
    )
    setup = Setup(out=tmp_path, images=2, jobs=1)
    rows, known, shown = measured(setup, small)
    digests = known["settings"].pop("weights")
    content = zoo.find("FR-ZF-07").path.read_bytes()
    assert digests["FR-ZF-07"] == hashlib.sha256(content).hexdigest()
    assert known["settings"] == {"images": 2, "seed": 0, "data": "scenes 2"}
    assert {row["perturbation"]: row["scores"] for row in known["rows"]} == rows
    assert list(rows) == list(small.published)
    records = work.read_all(setup, Attack.of("FR-ZF-07"))
    for network in small.networks:
        assert rows["none"][network] == work.score(setup, network).mean
        added = [(record.key, record.values) for record in records]
        assert rows["r1"][network] == work.score(setup, network, added).mean
    assert f"{rows['r1']['FCN-Alex']:.1f} (31.7)" in shown
    before = written(tmp_path / "scores", ".json")
    assert measured(setup, small)[0] == rows
    assert written(tmp_path / "scores", ".json") == before
    # A score that was measured with other weights is measured again.
    path = tables.cell(setup, "none", "FCN-Alex").path(setup)
    cell = json.loads(path.read_text())
    cell["score"], cell["of"]["weights"]["FCN-Alex"] = 1.0, "others"
    path.write_text(json.dumps(cell))
    assert measured(setup, small)[0] == rows


def test_a_table_by_command(tmp_path, capfd):
    arguments = ["--images", "1", "--jobs", "1", "--max-iter", "1", "--out", str(tmp_path)]
    assert main(["paper", "table", "segmentation", *arguments]) == 0
    shown = capfd.readouterr().out
    assert "| none | " in shown
    assert (tmp_path / "table-segmentation.md").read_text() in shown


def test_a_perturbation_of_another_image_is_refused(tmp_path):
    setup = Setup(out=tmp_path, images=1)
    with pytest.raises(ValueError, match=r"same images, got v2-07-test-0-000000 for other"):
        work.score(setup, "FR-ZF-07", [("other", torch.zeros(3, 128, 160))])


def test_a_file_that_cannot_be_read(tmp_path):
    setup = Setup(out=tmp_path, images=1, jobs=1)
    path = work.path_of(setup, ZF, 0)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"000000\.safetensors cannot be read, remove it"):
        made(setup)


def test_classes_must_be_those_of_the_data(tmp_path):
    setup = Setup(out=tmp_path, images=1, jobs=1, data=str(tmp_path))
    with pytest.raises(ValueError, match=r"FR-ZF-07 must have the classes of --data .*aeroplane"):
        made(setup)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("denseness", "FCOS-VGG"), "denseness needs a two-stage detector"),
        (("denseness", "FCN-VGG"), "denseness needs a two-stage detector"),
        (("convergence", "FCN-VG"), "did you mean FCN-VGG?"),
        (("convergence", "--data", "nowhere"), "must have the classes of --data nowhere"),
    ],
)
def test_bad_input(tmp_path, capfd, arguments, message):
    assert main(["paper", "figure", *arguments, "--jobs", "1", "--out", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err
    assert error.startswith("dagcore paper: error: ")
    assert error.count("\n") == 1
    assert message in error


SEGMENTATION, _, CROSS_TASK = tables.TABLES


def scores_with(**left):
    """The segmentation table with 80 % clean scores; `left` says what own perturbations leave."""
    rows = {row: dict.fromkeys(SEGMENTATION.networks, 80.0) for row in SEGMENTATION.published}
    for row, source in tables.SOURCES.items():
        if row in rows:
            rows[row][source] = left.get(row, 8.0)
    return tables.Scores(SEGMENTATION, rows)


def test_findings_are_means_of_shares():
    found = {one.what: one for one in reading.findings([scores_with(r5=16.0)])}
    assert found["White box"].count == 4
    assert found["White box"].measured == pytest.approx((20 + 10 + 10 + 10) / 4)
    own = [3.98 / 48.04, 3.98 / 48.92, 4.09 / 65.49, 4.18 / 67.09]
    assert found["White box"].paper == pytest.approx(100 * sum(own) / 4)
    across = [7.94 / 48.92, 5.10 / 48.04, 16.36 / 67.09, 12.72 / 65.49]
    assert found["Across training sets"].paper == pytest.approx(100 * sum(across) / 4)
    assert found["Across training sets"].measured == 100
    assert found["Across architectures"].count == 16
    assert "Across tasks" not in found
    assert found["Ensembles, members"].count == 4
    assert found["Permuted"].count == 12
    told = "\n".join(reading.text(list(found.values())))
    assert "White box (each network under its own perturbation): 12 % of the clean score" in told
    cross = tables.Scores(CROSS_TASK, reading.published_rows(CROSS_TASK))
    by = {one.what: one for one in reading.findings([cross])}
    assert by["Across tasks"].count == 10  # 2 x 2 + 2 x 3
    assert by["Ensembles, others"].measured == by["Ensembles, others"].paper


def test_where_joint_ensembles_are_weaker():
    rows = {
        "r5 + r7": {"FCN-Alex": 4.0, "FCN-VGG": 5.0, "DL-VGG": 50.0, "DL-RN101": 60.0},
        "joint r5 + r7": {"FCN-Alex": 3.0, "FCN-VGG": 6.0, "DL-VGG": 51.0, "DL-RN101": 60.0},
    }
    assert reading.weaker([rows]) == [
        "joint r5 + r7 leaves 6.0 on FCN-VGG, the sum 5.0.",
        "joint r5 + r7 leaves 55.5 on the other networks in the mean, the sum 55.0.",
    ]


def test_everything(tmp_path):
    """One table, the diagnoses and four examples, in small; the page holds all of them."""
    rows = {"none": (58.7, 48.04), "r1": (3.61, 31.74), "r1 + r5": (5.02, 4.32)}
    table = tables.Table("cross-task", ("FR-ZF-07", "FCN-Alex"), rows, ("joint r1 + r5",))
    names = ("circle-fcn-vgg", "two-masks", "two-tasks", "noise")
    chosen = [one for one in fancy.SCENARIOS if one.name in names]
    experiments = [
        partial(diagnoses.denseness, networks=["FR-ZF-07"], thresholds=[0.9]),
        partial(diagnoses.convergence, networks=["FR-ZF-07", "FCN-Alex"]),
        partial(fancy.fancy, scenarios=chosen),
    ]
    setup = Setup(out=tmp_path, images=2, jobs=1, max_iter=8)

    def everything():
        with Counter() as counter:
            return page.everything(setup, counter, tables=[table], experiments=experiments)

    assert "White box" in everything()[0]
    content = (tmp_path / "index.html").read_text()
    pictures = [
        "convergence.png",
        "denseness.png",
        *(f"fancy/{p.name}" for p in (tmp_path / "fancy").glob("*.png")),
    ]
    assert len(pictures) == 2 + 6
    for name in pictures:
        assert base64.b64encode((tmp_path / name).read_bytes()).decode() in content
    assert "http" not in content.replace("http-equiv", "")
    assert "<script" not in content
    for heading in (
        "Cross-task",
        "Reading the tables",
        "Denseness",
        "Convergence",
        "Fancy examples",
    ):
        assert f"<h2>{heading}</h2>" in content
    known = json.loads((tmp_path / "table-cross-task.json").read_text())
    for row in known["rows"]:
        for value in row["scores"].values():
            assert f">{value:.1f}" in content
    assert content.count('class="own"') == 1 + 2 + 2
    assert content.count("<small>") == 3 * 2
    _, joint = work.read_all(setup, tables.attacks(setup, "joint r1 + r5", "FCN-VGG")[0])
    assert joint.iterations == len(joint.active) - 1 == 8
    assert 0 < float(joint.values.abs().max()) <= 8 * 0.5 / 255 * 1.001
    assert joint.targets > 5000  # pixels and boxes
    kept = [tmp_path / name for name in ("perturbations", "scores", "fancy")]
    before = [written(folder, ".safetensors", ".json", ".png") for folder in kept]
    everything()
    assert [written(folder, ".safetensors", ".json", ".png") for folder in kept] == before
    assert (tmp_path / "index.html").read_text() == content


def test_a_prescribed_segmentation(tmp_path):
    setup = Setup(out=tmp_path, images=2, jobs=1)
    (scenario,) = (one for one in fancy.SCENARIOS if one.name == "square-fcn-vgg")
    fancy.make(setup, scenario)
    (row,) = json.loads((tmp_path / "fancy/square-fcn-vgg.json").read_text())["rows"]
    assert row["as wanted, %"] > 95
    assert 0 < row["updates"] < fancy.UPDATES
    assert (tmp_path / "fancy" / row["picture"]).is_file()


def test_killed_at_any_moment_the_tables_are_the_same(tmp_path):
    """A run that is killed, again and again, ends with the bytes of one that never was."""
    script = tmp_path / "small.py"
    script.write_text(
        """
import sys
from pathlib import Path
from dagcore.cli.progress import Counter
from dagcore.paper import Setup, tables

rows = {"none": (1, 1), "r1": (1, 1), "r5": (1, 1), "r1 + r5 (permuted)": (1, 1)}
table = tables.Table("cross-task", ("FR-ZF-07", "FCN-Alex"), rows, ("joint r1 + r5",))
setup = Setup(out=Path(sys.argv[1]), images=6, jobs=1, max_iter=6)
with Counter() as counter:
    tables.measure(setup, table, counter).report().write(setup)
"""
    )

    def start(out):
        return killing.Forked(tmp_path, str(script), [out])

    def results(out):
        found = {}
        for path in sorted(out.rglob("*")):
            if path.name.startswith("."):
                continue  # what was on its way
            if path.suffix == ".safetensors":
                found[path.relative_to(out)] = load_file(path)["perturbation"].numpy().tobytes()
            elif path.suffix in (".md", ".json"):
                found[path.relative_to(out)] = path.read_bytes()
        return found

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert killing.wait(start(whole)).returncode == 0
    expected = results(whole)
    total = len(expected)
    assert total == 3 * 6 + 2 * 5 + 2
    for wanted in (2, 8, 13, 17, 21):
        process = start(killed)
        while process.poll() is None and len(list(killed.rglob("*.*"))) < wanted:
            time.sleep(0.002)
        process.kill()
        killing.wait(process)
        partial = results(killed)
        assert 0 < len(partial) < total
        assert partial.items() <= expected.items()  # whole files only, and the right ones
    assert killing.wait(start(killed)).returncode == 0
    assert results(killed) == expected


ANNOTATION = """<annotation><object><name>cat</name><difficult>0</difficult>
<bndbox><xmin>21</xmin><ymin>11</ymin><xmax>60</xmax><ymax>50</ymax></bndbox></object></annotation>
"""


def a_devkit(root):
    """Three test images and two others of VOC2007, of two sizes, with a cat in each."""
    for name in ("JPEGImages", "Annotations", "SegmentationClass"):
        (root / "VOC2007" / name).mkdir(parents=True)
    sets = root / "VOC2007" / "ImageSets"
    for kind in ("Main", "Segmentation"):
        (sets / kind).mkdir(parents=True)
        (sets / kind / "test.txt").write_text("000001\n000002\n000003\n")
        (sets / kind / "trainval.txt").write_text("000004\n000005\n")
    cat = Image.fromarray(skimage.data.chelsea())
    for k in range(1, 6):
        size = (96, 80) if k % 2 else (80, 96)
        cat.resize(size).save(root / "VOC2007" / "JPEGImages" / f"00000{k}.jpg")
        mask = Image.new("L", size)
        mask.paste(VOC_CLASSES.index("cat"), (20, 10, 60, 50))
        mask.paste(255, (0, 0, 9, 9))
        mask.save(root / "VOC2007" / "SegmentationClass" / f"00000{k}.png")
        (root / "VOC2007" / "Annotations" / f"00000{k}.xml").write_text(ANNOTATION)


def test_voc_and_weights_of_the_users_own(tmp_path, capfd):
    """The whole way on images of VOC's form, with networks that have seen nothing."""
    a_devkit(tmp_path / "VOCdevkit")
    for name in ("FR-ZF-07", "FCN-Alex"):
        torch.manual_seed(0)
        network = zoo.build(name, width=1 / 16).eval()
        known = {"width": 1 / 16, "classes": list(VOC_CLASSES)}
        path = tmp_path / "weights" / f"{zoo.find(name).slug}.safetensors"
        save_weights(path, network, known)
    rows = {"none": (58.7, 48.04), "r5": (3.61, 31.74), "r1 + r5": (5.02, 4.32)}
    further = ("joint r1 + r5", "universal r5")
    table = tables.Table("cross-task", ("FR-ZF-07", "FCN-Alex"), rows, further)
    given = {"data": str(tmp_path / "VOCdevkit"), "weights": tmp_path / "weights"}
    setup = Setup(out=tmp_path / "out", images=3, jobs=1, max_iter=5, **given)
    found, *_ = measured(setup, table)
    assert list(found) == [*rows, *further]
    records = work.read_all(setup, setup.attack("FCN-Alex"))
    assert [record.key for record in records] == ["000001", "000002", "000003"]
    assert [record.values.shape[1:] for record in records] == [(80, 96), (96, 80), (80, 96)]
    assert records[0].targets == 80 * 96 - 81
    added = [(record.key, record.values) for record in records]
    assert found["r5"]["FCN-Alex"] == work.score(setup, "FCN-Alex", added).mean
    (universal,) = tables.attacks(setup, "universal r5", "FCN-VGG")
    assert work.read(setup, universal, 0).values.shape == (3, 96, 96)
    arguments = ["--images", "4", "--jobs", "1", "--out", str(tmp_path / "x")]
    arguments += [text for name, value in given.items() for text in (f"--{name}", str(value))]
    assert main(["paper", "figure", "perceptibility", "FCN-Alex", *arguments]) == 2
    assert "--images must be at most 3" in capfd.readouterr().err
