"""Attack against defence, and what networks do around images."""

import json

import pytest
import torch

from dagcore.__main__ import main
from dagcore.cli.progress import Counter
from dagcore.paper import Setup, defence, why


def run_defence(setup, networks, chosen):
    with Counter() as counter:
        return defence.defence(setup, counter, networks, chosen=chosen)


def test_the_rows_of_a_network(tmp_path):
    """Attackers who know more leave less; what is kept is used again."""
    setup = Setup(out=tmp_path, images=2, max_iter=5, jobs=1)
    report = run_defence(setup, ["FCN-VGG"], ["none", "JPEG 75", "noise 0.03"])
    assert [row["defence"] for row in report.rows] == ["none", "JPEG 75", "noise 0.03"]
    bare, jpeg, _ = report.rows
    assert bare["2/255, oblivious"] == bare["2/255, adaptive"]
    for row in report.rows:
        for radius in ("1/255", "2/255"):
            left = [row[f"{radius}, {what}"] for what in ("oblivious", "adaptive", "worst case")]
            assert left[2] <= min(left) + 1e-9
            assert 0 <= left[2] < row["clean"] <= 100
    assert bare["2/255, worst case"] <= bare["1/255, worst case"]
    assert jpeg["2/255, adaptive"] < jpeg["2/255, oblivious"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    again = run_defence(setup, ["FCN-VGG"], ["none", "JPEG 75", "noise 0.03"])
    assert again.rows == report.rows
    assert {path: path.stat().st_mtime_ns for path in before} == before
    paths = report.write(setup)
    assert {path.name for path in paths} == {"defence.json", "defence.md", "defence.png"}
    assert "At 2/255 transforms leave, in the mean," in (tmp_path / "defence.md").read_text()


def test_the_rows_of_a_detector(tmp_path):
    setup = Setup(out=tmp_path, images=2, max_iter=3, jobs=1)
    (row,) = run_defence(setup, ["FR-ZF-07"], ["median 3"]).rows
    for radius in ("1/255", "2/255"):
        assert row[f"{radius}, worst case"] <= row[f"{radius}, adaptive"]
        assert row[f"{radius}, worst case"] <= row["clean"]


def rows_of(**left):
    """Two networks, one trained against attacks, behind nothing and behind one transform."""
    return [
        {
            "network": network,
            "defence": name,
            "clean": 80.0,
            **{
                f"{radius}, {what}": value
                for radius in defence.RADII
                for what, value in zip(("oblivious", "adaptive", "worst case"), values, strict=True)
            },
        }
        for (network, name), values in {
            ("A", "none"): (10.0, 10.0, 4.0),
            ("A", "blur"): (60.0, 20.0, 12.0),
            ("A-PGD", "none"): (50.0, 50.0, 40.0),
            ("A-PGD", "blur"): (60.0, 50.0, 41.0),
        }.items()
    ]


def test_what_is_read_off_the_table():
    lines = defence.reading(rows_of())
    assert lines[0] == (
        "At 1/255 transforms leave, in the mean, 60.0 % to attackers who do not know of them, "
        "35.0 % to those who do, and 26.5 % in the worst case. There the largest gain over no "
        "defence is 8.0 points: blur on A."
    )
    assert lines[1] == (
        "Trained against attacks, at 1/255: A-PGD keeps 40.0 of 80.0 %, A 4.0 of 80.0 %."
    )
    assert len(lines) == 4


def test_spectra():
    """A wave of one frequency is in its ring, noise in all of them by their areas."""
    x = torch.arange(64.0)
    wave = torch.cos(2 * torch.pi * x * 12 / 64).expand(3, 48, 64) + 5
    found = why.spectrum(wave)
    assert found[int(12 / 64 * 2 * why.BINS)] == pytest.approx(100)
    noise = torch.randn(3, 256, 256, generator=torch.Generator().manual_seed(0))
    found = why.spectrum(noise)
    assert sum(found) == pytest.approx(100)
    # The last ring has the corners too: 1 - pi (15/32)^2 of the square.
    assert found[-1] == pytest.approx(100 * (1 - torch.pi * (15 / 32) ** 2), abs=1)


def test_around_an_image():
    """Of scores that are known: the lead, its gradient and what is right."""
    weight = torch.tensor([[1.0, 0, 0], [0, 1, 0]])[:, :, None, None]

    def victim(images):
        return torch.nn.functional.conv2d(images, weight)

    image = torch.tensor([0.7, 0.2, 0.5])[None, :, None, None].expand(1, 3, 4, 6).contiguous()
    labels = torch.zeros(1, 4, 6, dtype=torch.int64)
    labels[0, 0] = 1
    labels[0, 1] = 255
    lead, steepness, right = why.around(victim, image, labels)
    assert lead == pytest.approx((12 * 0.5 - 6 * 0.5) / 18)
    assert right == pytest.approx(100 * 12 / 18)
    assert steepness == pytest.approx((2 * 18) ** 0.5 / 18)


def test_why_by_command(tmp_path, capfd):
    arguments = ["--images", "2", "--max-iter", "40", "--jobs", "1", "--out", str(tmp_path)]
    assert main(["paper", "figure", "why", "FCN-VGG", "FCN-VGG*", *arguments]) == 0
    assert "| network | lead of the true class | lead at r |" in capfd.readouterr().out
    rows = json.loads((tmp_path / "why.json").read_text())["rows"]
    assert (tmp_path / "why.png").stat().st_size > 10_000
    for row in rows:
        assert row["lead at r"] < 0 < row["lead at noise as long"]
        assert row["correct at r, %"] < 5
        assert row["correct at noise as long, %"] > 0.9 * row["correct, %"]
        assert sum(row["spectrum of r"]) == pytest.approx(100)
        ((other, cosine, left),) = row["transfer"]
        assert {other, row["network"]} == {"FCN-VGG", "FCN-VGG*"}
        assert 0 < cosine < 1
        assert 0 <= left <= 110
    assert main(["paper", "figure", "why", "FR-ZF-07", *arguments]) == 2
    assert "why needs segmentation networks, got FR-ZF-07" in capfd.readouterr().err
