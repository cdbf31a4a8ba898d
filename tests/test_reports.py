"""Reports of evaluations: what summaries say, as a page, as Markdown, and beside one another."""

import base64
import itertools
import json
import re
from html.parser import HTMLParser

import pytest
import torch

from dagcore.evaluation import reports
from dagcore.evaluation.protocols import PROTOCOLS
from dagcore.evaluation.reports import charts, exports, pages
from dagcore.files import write_image

NAME = 'A<b> & "Ü|ö"'  # of everything that users name
VIEWS = ((None, "memory"), (None, "file"))


class Page(HTMLParser):
    """The tables, the words and the elements of a page; raises where an element is not closed."""

    VOID = ("meta", "img")

    def __init__(self, content):
        super().__init__()
        self.open, self.elements, self.words, self.tables = [], [], [], []
        self.feed(content)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def table(self, *head):
        """The rows of the table whose columns begin with `head`, those of groups with its name."""
        (found,) = (one for one in self.tables if tuple(one[0][: len(head)]) == head)
        rows, group = [], []
        for row in found[1:]:
            if len(row) < len(found[0]):
                group = row
            else:
                rows.append([*group, *row])
        return rows


def markdown_tables(content):
    """Tables as rows of cells, each row as wide as the first."""
    found = []
    for block in content.split("\n\n"):
        if block.startswith("|"):
            lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
            assert {len(line) for line in lines} == {len(lines[0])}
            found.append([[cell.strip().strip("*") for cell in line] for line in lines])
    return found


def entry(name, attack, **more):
    known = {"task": "segmentation", "adversarial": "untargeted", "epsilon": None}
    return {"name": name, "attack": attack, **known, "class_weights": None, "settings": {}, **more}


def common(task, attacks, classes, results, worst, **more):
    protocol = {"name": f"own {NAME}", "title": "Ours & theirs", "attacks": attacks}
    return {
        "protocol": {**protocol, "epsilon": [4 / 255, 8 / 255], "norm": "linf"},
        "task": task,
        "images": 3,
        "evaluated": 2,
        "failed": [{"number": 2, "name": f"image {NAME}", "reason": "broken <pixels>"}],
        "classes": classes,
        "results": results,
        "worst_case": worst,
        "cost": {"clean passes per image": 2, "forward": 84.0, "backward": 80.5, "judging": 8.0},
        "network": "DL-VGG",
        "digest of the weights": "0123456789abcdef0123",
        "data": f"scenes {NAME}",
        "seed": 7,
        "versions": {"dagcore": "0.1.0", "device": "CPU"},
        "warnings": [f"hardly a label fits {NAME}"],
        **more,
    }


def scores(right, **more):
    """Scores that follow from one number."""
    per_class = {"background": {"IoU": right, "Acc": right}, NAME: {"IoU": right / 4, "Acc": None}}
    means = {"aAcc": right, "mIoU": right / 2, "mAcc": right - 1, "aAcc of images": right - 2}
    return {**means, "per_class": per_class, **more}


def segmentation(attacks=None, norm="linf", **more):
    """Two attacks in two balls, in memory and in files."""
    attacks = attacks or [
        entry(
            NAME,
            "apgd",
            class_weights="balanced",
            settings={"loss": "jensen-shannon", "radii": "shrinking"},
        ),
        entry("CosPGD", "cospgd", settings={"steps": 10}),
    ]
    names = [one["name"] for one in attacks]
    results, worst = [], []
    for e, epsilon in enumerate((4 / 255, 8 / 255)):
        for levels, stage in VIEWS:
            place = {"norm": norm, "epsilon": epsilon, "levels": levels, "stage": stage}
            base = 60 - 20 * e + 0.5 * (stage == "file")
            for k, name in enumerate(names):
                counts = {"iterations": 9.5, "forward": 11.0, "backward": 10.0}
                counts |= {"perceptibility": 0.01, "examples_of_smaller_balls": e}
                steps = {0: 96.0, 1: 90.0, 10: base + k}
                found = scores(base + k, attack=name, correct_by_step=steps)
                results.append({**found, **counts, **place})
            won = dict.fromkeys(names, 0) | {names[0]: 2}
            worst.append({**scores(base - 1), **place, "attacks": names, "rounds": 2})
            del worst[-1]["mAcc"]
            worst[-1] |= {"images won, aAcc": won, "images won, mIoU": won}
    return common(
        "segmentation",
        attacks,
        ["background", NAME, "absent"],
        results,
        worst,
        **{"clean": scores(96.0), **more},
    )


def detections(score, wrong_place, wrong_class, **more):
    errors = {"correct": 5, "localisation": wrong_place, "classification": wrong_class}
    errors |= {"missed": 3, "objects": 9}
    means = {"mAP": score, "AP50 (COCO)": score + 1}
    return {**means, "errors": errors, "per_class": {"cat": {"AP": score}}, **more}


def detection(**more):
    counts = {"iterations": 10.0, "forward": 11.0, "backward": 10.0, "perceptibility": 0.01}
    counts["examples_of_smaller_balls"] = 0
    attacks = [entry(goal, "pgd", task="detection", adversarial=goal) for goal in ("vanish", "off")]
    results = [
        detections(score, place, 2, attack=name, norm="linf", levels=None, **counts, **where)
        for name, score, place in (("vanish", 12.5, 1), ("off", 30.25, 4))
        for where in (
            {"epsilon": 8 / 255, "stage": "memory"},
            {"epsilon": 8 / 255, "stage": "file"},
        )
    ]
    clean = detections(80.5, 0, 1)
    return common("detection", attacks, ["cat", "dog"], results, [], **{"clean": clean, **more})


def records():
    """Two images with their worst examples, and one that was passed over."""
    found = {}
    for k, (name, right) in enumerate((("one", 30), ("folder/two", 10))):
        clean = {"pixels": {"0": [60, 65, 80], "1": [15, 35, 20]}}
        worst = {"attack": "CosPGD, 8/255", "correct": right}
        found[k] = {"number": k, "name": name, "clean": clean, "worst": worst, "cells": []}
    found[2] = {"number": 2, "name": "three", "status": "failed", "reason": "broken"}
    return found


def written(out, summary, known=None, **more):
    reports.write(out, summary, records() if known is None else known, **more)
    content = (out / "report.html").read_text(encoding="utf-8")
    return Page(content), (out / "report.md").read_text(encoding="utf-8")


BOTH = pytest.mark.parametrize("make", [segmentation, detection])


@BOTH
def test_a_page_is_self_contained(make, tmp_path):
    image = tmp_path / "figures" / "one.png"
    image.parent.mkdir()
    write_image(image, torch.rand(3, 4, 5))
    figures = [{"name": NAME, "path": "figures/one.png", "note": "at <8/255>"}]
    page, _ = written(tmp_path, make(figures=figures), {})
    tags = [tag for tag, _ in page.elements]
    assert "script" not in tags
    assert "link" not in tags
    content = (tmp_path / "report.html").read_text()
    assert "http" not in content
    assert "url(" not in content
    anchors = [known["id"] for _, known in page.elements if "id" in known]
    assert len(set(anchors)) == len(anchors)
    links = [known["href"] for _, known in page.elements if "href" in known]
    assert links == [f"#{anchor}" for anchor in anchors]
    assert all(
        k["src"].startswith("data:image/png;base64,") for _, k in page.elements if "src" in k
    )
    assert f"Robustness of DL-VGG on scenes {NAME}: own {NAME}" in page.text
    assert f"Warning: hardly a label fits {NAME}." in page.text


@BOTH
def test_the_same_bytes(make, tmp_path):
    summary = make()
    names = ("report.html", "report.md", "model_info.json", "semsegbench.json")
    for out, one in ((tmp_path / "a", summary), (tmp_path / "b", json.loads(json.dumps(summary)))):
        reports.write(out, one, records())
        reports.write(out, one, records())
    kept = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert kept == sorted(names if make is segmentation else names[:2])
    for name in kept:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_results_of_segmentation(tmp_path):
    page, text = written(tmp_path, segmentation())
    assert "clean aAcc 96.0 % mIoU 48.0 %" in page.text
    assert "worst case, 4/255 aAcc 59.0 % mIoU 29.5 %" in page.text
    assert "worst case, 8/255 aAcc 39.0 % mIoU 19.5 %" in page.text
    rows = page.table("attack", "aAcc", "mIoU")
    counts = ["9.5", "11.0", "10.0"]
    assert rows == [
        ["clean", "96.00", "48.00", "95.00", "94.00", "-", "-", "-"],
        ["4/255, in memory", NAME, "60.00", "30.00", "59.00", "58.00", *counts],
        ["4/255, in memory", "CosPGD", "61.00", "30.50", "60.00", "59.00", *counts],
        ["4/255, in memory", "worst case", "59.00", "29.50", "-", "57.00", "-", "-", "-"],
        ["4/255, rounded to 8 bits", NAME, "60.50", "30.25", "59.50", "58.50", *counts],
        ["4/255, rounded to 8 bits", "CosPGD", "61.50", "30.75", "60.50", "59.50", *counts],
        ["4/255, rounded to 8 bits", "worst case", "59.50", "29.75", "-", "57.50", *"---"],
        ["8/255, in memory", NAME, "40.00", "20.00", "39.00", "38.00", *counts],
        ["8/255, in memory", "CosPGD", "41.00", "20.50", "40.00", "39.00", *counts],
        ["8/255, in memory", "worst case", "39.00", "19.50", "-", "37.00", "-", "-", "-"],
        ["8/255, rounded to 8 bits", NAME, "40.50", "20.25", "39.50", "38.50", *counts],
        ["8/255, rounded to 8 bits", "CosPGD", "41.50", "20.75", "40.50", "39.50", *counts],
        ["8/255, rounded to 8 bits", "worst case", "39.50", "19.75", "-", "37.50", *"---"],
    ]
    assert page.table("class") == [
        ["background", "", "96.00", "59.00", "39.00"],
        [NAME, "", "24.00", "14.75", "9.75"],
    ]
    assert page.table("attack", "aAcc, 4/255") == [[NAME, *"2222"], ["CosPGD", *"0000"]]
    assert "2 of 3 images" in page.text
    assert "seed 7. Radii are of balls in L-infinity." in page.text
    assert "2 examples are those of a smaller ball" in page.text
    first = markdown_tables(text)[0]
    escaped = r'A&lt;b&gt; & "Ü\|ö"'.replace(" & ", " &amp; ")
    assert first[2][:4] == ["", "", "clean", "96.00"]
    told = [[f"{radius}, {view}", *of] for radius, view, *of in first[3:]]
    assert [[c.replace(escaped, NAME) for c in row] for row in told] == rows[1:]


def test_what_was_run(tmp_path):
    page, text = written(tmp_path, segmentation())
    rows = page.table("attack", "kind")
    radii = "4/255, 8/255"
    loss = "jensen-shannon, classes balanced"
    assert rows == [
        [NAME, "apgd", loss, "untargeted", radii, "100", "adaptive", "yes", "radii: shrinking"],
        ["CosPGD", "cospgd", "its own", "untargeted", radii, "10", "0.01", "yes", ""],
    ]
    assert "Ours &amp; theirs." in text
    assert page.table("passes") == [
        ["clean images", "2.0"],
        ["attacks, forward", "84.0"],
        ["attacks, backward", "80.5"],
        ["judging of examples", "8.0"],
    ]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol(name, tmp_path):
    """A page of each, with balls of two norms, and without any."""
    protocol = PROTOCOLS[name]
    task = "detection" if name.startswith("detection") else "segmentation"
    summary = detection() if task == "detection" else segmentation()
    summary |= {"protocol": protocol.record(), "results": [], "worst_case": []}
    like = (detection if task == "detection" else segmentation)()
    for one in protocol.attacks_for(task):
        for epsilon in protocol.radii(one):
            norm = one.norm if one.in_a_ball else None
            place = {"norm": norm, "epsilon": epsilon, "attack": one.name}
            summary["results"].append({**like["results"][0], **place})
            worst = {k: v for k, v in place.items() if k != "attack"}
            if task == "segmentation" and (epsilon, norm) not in [
                (o["epsilon"], o["norm"]) for o in summary["worst_case"]
            ]:
                known = {"attacks": [one.name], "images won, aAcc": {one.name: 2}}
                known["images won, mIoU"] = {one.name: 2}
                summary["worst_case"].append({**like["worst_case"][0], **worst, **known})
    page, text = written(tmp_path, summary)
    assert len(page.table("attack", "kind")) == len(protocol.attacks_for(task))
    assert len(markdown_tables(text)[0]) == 2 + 1 + len(summary["results"]) + len(
        {(one["norm"], one["epsilon"]) for one in summary["results"]}
    )
    assert ("Scores over the radius" in page.text) == (name != "dag-2017")
    assert (tmp_path / "model_info.json").exists() == (
        name not in ("dag-2017", "detection-tog-2020")
    )


def test_curves(tmp_path):
    page, _ = written(tmp_path, segmentation())
    lines = [known for tag, known in page.elements if tag == "polyline"]
    radii, steps = lines[:6], lines[6:]
    assert [line["class"] for line in radii] == ["band", "curve", "curve"] * 2
    across = (34, 211, 388)  # clean, 4/255, 8/255
    down = [charts.TOP + 198 * (1 - y / 100) for y in (96, 60, 40)]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))
    assert radii[1]["points"] == points
    assert [len(line["points"].split()) for line in steps] == [3] * 4
    assert f"{NAME}: 60.00 %" in page.text
    assert page.text.count("CosPGD: 96.00 %") == 3  # clean aAcc, and before any update in two balls


def test_labels_of_ticks_do_not_overlap():
    ticks = [(float(x), f"{x}/255") for x in range(1, 33)]
    chart = charts.line_chart("t", [], ticks, "radius")
    found = re.findall(r'<text x="([\d.]+)" y="226" text-anchor="middle">(\d+)/255', chart)
    places = [float(x) for x, _ in found]
    assert found[0][1] == "1"
    assert found[-1][1] == "32"
    assert len(found) >= 5
    assert all(b - a >= 5 * charts.LETTER for a, b in itertools.pairwise(places))
    assert places[-1] + 2.5 * charts.LETTER <= charts.WIDTH


def test_styles_of_lines():
    """Twenty-four lines that all differ, by colour or by dashes."""
    points = [(0.0, 0.0), (1.0, 100.0)]
    lines = [charts.Line(str(k), points, k) for k in range(24)]
    chart = charts.line_chart("t", lines, [(0.0, "0"), (1.0, "1")], "")
    assert len(set(re.findall(r'class="curve" style="([^"]*)"', chart))) == 24


def test_a_nested_bar_shows_the_shorter_over_the_longer():
    """A class may gain from an attack, or be in no image at all."""
    bar = charts.nested_bar([20.0, None, 80.0])
    assert re.findall(r"width:([\d.]+)%;opacity:([\d.]+)", bar) == [
        ("80.00", "1.00"),
        ("20.00", "0.33"),
    ]


def test_results_of_detection(tmp_path):
    page, text = written(tmp_path, detection(), {})
    assert "clean mAP 80.5 % AP50 (COCO) 81.5 %" in page.text
    assert "lowest of the attacks, 8/255 mAP 12.5 % AP50 (COCO) 13.5 %" in page.text
    memory = [row for row in page.table("attack", "mAP") if row[0] == "8/255, in memory"]
    counts = ["10.0", "11.0", "10.0"]
    assert memory == [
        ["8/255, in memory", "vanish", "12.50", "13.50", *counts],
        ["8/255, in memory", "off", "30.25", "31.25", *counts],
        ["8/255, in memory", "lowest of the attacks", "12.50", "13.50", *"---"],
    ]
    assert page.table("class") == [["cat", "", "80.50", "12.50", "30.25"]]
    rows = page.table("attack", "\xa0", "correct", "wrong place", "wrong class", "object missed")
    assert rows == [
        ["clean", "", "5", "0", "1", "3"],
        ["vanish, 8/255", "", "5", "1", "2", "3"],
        ["off, 8/255", "", "5", "4", "2", "3"],
    ]
    bars = [
        known["style"]
        for tag, known in page.elements
        if tag == "i" and "width:35.71%" in str(known)
    ]
    assert len(bars) == 3  # 5 of 14, the most of any row
    assert [[name, *of] for name, _, *of in rows] in [table[2:] for table in markdown_tables(text)]
    assert "worst case" not in page.text
    assert "updates" not in page.text.split("Scores over the radius")[1].split("Cost")[0]


def test_classes_of_detection_are_those_of_the_largest_ball(tmp_path):
    summary = detection()
    for score, epsilon in ((50.0, 4 / 255), (5.0, 16 / 255)):
        like = {**summary["results"][0], "epsilon": epsilon}
        summary["results"].append({**like, "per_class": {"cat": {"AP": score}}})
    page, _ = written(tmp_path, summary, {})
    assert page.table("class", "\xa0", "clean", "vanish") == [["cat", "", "80.50", "5.00"]]
    assert "Average precision in percent, 16/255." in page.text


def test_checks(tmp_path):
    page, text = written(tmp_path, segmentation())
    assert "Checks of the evaluation: not run." in page.text
    assert "Checks of the evaluation: not run." in text
    checks = [
        {"name": "labels-fit", "verdict": "passed", "text": "97 % <fit>.", "figures": {"x": 1}},
        {"name": "noise-as-strong", "verdict": "flagged", "text": "As strong.", "figures": {}},
        {"name": "transfer-stronger", "verdict": "skipped", "text": "None given.", "figures": {}},
        {"name": "zero-gradient", "verdict": "passed", "text": "None.", "figures": {}},
    ]
    page, text = written(tmp_path, segmentation(checks=checks))
    assert "Checks of the evaluation: 2 passed, 1 flagged, 1 skipped." in page.text
    told = [f"{one['name']}: {one['verdict']}. {one['text']}" for one in checks]
    assert " ".join(told) in page.text
    assert "| **flagged** | **noise-as-strong** | **As strong.** |" in text
    (info, _) = json.loads((tmp_path / "model_info.json").read_text())
    assert info["unreliable"] is True


def test_worst_images(tmp_path):
    """The worst first; their pictures where there are no figures of them, and figures else."""
    for path in ("images/one.png", "images/folder/two.png", "figures/two.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        write_image(tmp_path / path, torch.rand(3, 4, 5))

    def content(path):
        return "data:image/png;base64," + base64.b64encode((tmp_path / path).read_bytes()).decode()

    page, _ = written(tmp_path, segmentation())
    assert page.table("image") == [
        ["folder/two", "CosPGD, 8/255", "75.00", "10.00"],
        ["one", "CosPGD, 8/255", "75.00", "30.00"],
    ]
    shown = [known["src"] for tag, known in page.elements if tag == "img"]
    assert shown == [content("images/folder/two.png"), content("images/one.png")]
    figures = [
        {"name": "two", "path": "figures/two.png", "note": NAME},
        {"name": "absent", "path": "figures/absent.png", "note": ""},
    ]
    for page, _ in (
        written(tmp_path, segmentation(figures=figures)),
        written(tmp_path, segmentation(), figures=figures),
    ):
        assert [k["src"] for tag, k in page.elements if tag == "img"] == [
            content("figures/two.png")
        ]
        assert f"two: {NAME}" in page.text


def test_images_passed_over(tmp_path):
    page, text = written(tmp_path, segmentation())
    assert page.table("number") == [["2", f"image {NAME}", "broken <pixels>"]]
    assert "broken &lt;pixels&gt;" in text
    none = {"clean": None, "results": [], "worst_case": [], "classes": [], "evaluated": 0}
    out = tmp_path / "none"
    page, text = written(out, segmentation() | none, {2: records()[2]})
    assert "No image could be evaluated." in page.text
    assert "No image could be evaluated." in text
    assert page.table("number") == [["2", f"image {NAME}", "broken <pixels>"]]
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.md"]


def test_scores_of_nothing(tmp_path):
    """Where no class is in any image, there are no scores."""
    summary = segmentation()
    for one in (summary["clean"], *summary["results"], *summary["worst_case"]):
        one |= dict.fromkeys(("aAcc", "mIoU", "mAcc", "aAcc of images")) | {"per_class": {}}
    for one in summary["results"]:
        one["correct_by_step"] = dict.fromkeys(one["correct_by_step"])
    page, _ = written(tmp_path, summary)
    assert page.table("attack", "aAcc")[1][2:6] == ["-"] * 4
    assert not (tmp_path / "model_info.json").exists()


def test_model_info():
    first, second = exports.model_info(segmentation())
    assert first == {
        "link": "",
        "name": "DL-VGG",
        "authors": "",
        "additional_data": None,
        "number_forward_passes": 1,
        "dataset": f"scenes {NAME}",
        "venue": "",
        "architecture": "DL",
        "eps": "4/255",
        "clean_acc": "96.00",
        "reported": "",
        "autoattack_acc": "59.00",
        "footnote": "Share of pixels, 2 images. autoattack_acc is the worst case for each image of "
        f"the protocol own {NAME} ({NAME}, CosPGD) in the norm linf.",
        "unreliable": None,
    }
    assert (second["eps"], second["autoattack_acc"]) == ("8/255", "39.00")
    assert exports.model_info(detection()) == []


def test_semsegbench():
    attacks = [
        entry("PGD", "pgd", settings={"norm": "l2", "alpha": 0.1, "steps": 7}),
        entry("SegPGD", "segpgd"),
        entry("aimed", "pgd", adversarial="permutation"),
        entry("APGD", "apgd"),
    ]
    found = exports.semsegbench(segmentation(attacks, norm="l2"))
    rows = found[f"scenes {NAME}"]["DL"]["VGG"]
    same = {"norm": "l2", "aAcc": 60.0, "mIoU": 30.0, "mAcc": 59.0}
    assert rows[0] == {"alpha": 0.000392157, "epsilon": 4, "iterations": 7, "name": "pgd", **same}
    assert [(row["name"], row["alpha"], row["epsilon"], row["iterations"]) for row in rows] == [
        ("pgd", 0.000392157, 4, 7),
        ("segpgd", 3.92157e-05, 4, 20),
        ("pgd", 0.000392157, 8, 7),
        ("segpgd", 3.92157e-05, 8, 20),
    ]
    assert exports.semsegbench(detection()) == {}
    assert exports.semsegbench(segmentation([entry("APGD", "apgd")])) == {}


@pytest.mark.parametrize(
    ("network", "parts"),
    [
        ("DL-VGG", ("DL", "VGG")),
        ("deeplabv3_mobilenet_v3_large", ("deeplabv3", "mobilenet_v3_large")),
        ("SegNet", ("SegNet", "")),
        ("nets/own-net.py:make", ("nets/own-net.py:make", "")),
    ],
)
def test_architecture(network, parts):
    assert exports.architecture_of(network) == parts


def finished(out, summary):
    out.mkdir()
    (out / "summary.json").write_text(json.dumps(summary))
    return out


def test_compare(tmp_path):
    first, second = segmentation(), segmentation(network="other|net")
    second["results"][0] |= {"aAcc": 58.5, "mIoU": None}
    second["worst_case"][0]["aAcc"] = 60.25
    a, b = finished(tmp_path / "a", first), finished(tmp_path / "b", second)
    text = reports.compare(a, b)
    assert "Not to be compared" not in text
    assert "Only in" not in text
    assert text.startswith("A: DL-VGG on scenes")
    assert r"B: other\|net on scenes" in text
    ((head, _, *rows),) = markdown_tables(text)
    aacc, miou = (["aAcc, A", "aAcc, B", "aAcc, B - A"], ["mIoU, A", "mIoU, B", "mIoU, B - A"])
    assert head == ["radius", "images", "attack", *aacc, *miou]
    assert len(rows) == 1 + 2 * 2 * 3
    cells = {tuple(row[:3]): row[3:] for row in rows}
    assert cells["", "", "clean"] == ["96.00", "96.00", "+0.00", "48.00", "48.00", "+0.00"]
    attack = pages.markdown(NAME)
    assert cells["4/255", "in memory", attack] == ["60.00", "58.50", "-1.50", "30.00", "-", "-"]
    assert cells["4/255", "in memory", "worst case"][:3] == ["59.00", "60.25", "+1.25"]


def test_compare_tells_what_differs(tmp_path):
    first = segmentation()
    second = segmentation([entry("PGD", "pgd")], data="others", evaluated=3)
    second["protocol"]["name"] = "short"
    a, b = finished(tmp_path / "a", first), finished(tmp_path / "b", second)
    told = [line for line in reports.compare(a, b).splitlines() if line][2:5]
    name = pages.markdown(NAME)
    assert told == [
        f"**Not to be compared: the protocols differ, own {name} and short.**",
        f"**Not to be compared: the data sets differ, scenes {name} and others.**",
        "**Not to be compared: the numbers of images differ, 2 and 3.**",
    ]
    assert reports.compare(a, b).endswith("Only in A: 8 rows. Only in B: 4 rows.\n")
    second = segmentation()
    second["protocol"]["attacks"][1]["settings"] = {"steps": 11}
    c = finished(tmp_path / "c", second)
    assert f"the protocols named own {name} differ in their settings.**" in reports.compare(a, c)


def test_compare_detection(tmp_path):
    a, b = (finished(tmp_path / name, detection()) for name in "ab")
    (table,) = markdown_tables(reports.compare(a, b))
    assert [row[2] for row in table[2:]] == ["clean", "vanish", "vanish", "off", "off"] + [
        "lowest of the attacks"
    ] * 2


def test_compare_refuses(tmp_path):
    good = finished(tmp_path / "good", segmentation())
    other = finished(tmp_path / "other", detection())
    run = finished(tmp_path / "run", {"images": 3})
    none = finished(tmp_path / "none", segmentation(clean=None))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "summary.json").write_text("{")
    wanted = "--compare must have two folders of finished evaluations, got "
    for bad, why in (
        (tmp_path / "absent", f"{wanted}.*absent: .*summary.json does not exist"),
        (broken, f"{wanted}.*broken: Expecting"),
        (run, f"{wanted}.*run, which holds another command's results"),
        (none, f"{wanted}.*none, where no image could be evaluated"),
        (other, "--compare must have two evaluations of one task, got segmentation in .*good and"),
    ):
        with pytest.raises(ValueError, match=why):
            reports.compare(good, bad)


def test_markdown_shows_a_text_unchanged():
    assert pages.markdown("a|b <i> & `c` *d* [e] \\\n f_g") == (
        r"a\|b &lt;i&gt; &amp; \`c\` \*d\* \[e\] \\ f_g"
    )


def test_names_that_are_no_utf_8(tmp_path):
    summary = segmentation(data="scenes \udcff")
    page, text = written(tmp_path, summary)
    assert r"scenes \udcff" in page.text
    assert r"scenes \udcff" in text
