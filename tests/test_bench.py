"""`dagcore bench` in small: that every side is timed and told, not how long it takes."""

import json

import pytest

from dagcore.__main__ import main
from dagcore.cli.bench import bench
from dagcore.timing import alternate


def test_ops_and_updates(tmp_path, capsys):
    bench(
        "FCN-Alex",
        None,
        (2, 32, 48),
        rounds=3,
        device="cpu",
        path=tmp_path / "times.json",
        shapes=((1, 5, 32, 32), (2, 3, 16, 16)),
        updates=2,
    )
    shown = capsys.readouterr().out
    known = json.loads((tmp_path / "times.json").read_text())
    rows = [(row["what"], row["case"]) for row in known["rows"]]
    losses = ("cross-entropy", "jensen-shannon", "cosine", "dlr")
    expected = []
    for high, low in (("1x5x32x32", "1x5x4x4"), ("2x3x16x16", "2x3x2x2")):
        expected += [("dag_seed", high), ("dag_seed_bilinear", low)]
        expected += [(f"loss_seed, {loss}", high) for loss in losses]
        expected += [(f"loss_seed_bilinear, {loss}", low) for loss in losses]
    steps = ("linf_step_", "pgd_step_, linf", "pgd_step_, l2")
    expected += [(step, "8x3x512x512") for step in steps]
    attacks = ("DAG", "PGD", "SegPGD", "CosPGD", "APGD")
    expected += [(f"FCN-Alex, {attack}", "2x3x32x48") for attack in attacks]
    assert rows == expected
    for row in known["rows"]:
        assert "native" in row["seconds"]
        slow = row["what"].partition(", ")[2] not in attacks[1:]  # DAG alone, of the attacks
        assert ("reference" in row["seconds"]) == slow
        assert all(len(times) == 3 and min(times) > 0 for times in row["seconds"].values())
        assert row["what"] in shown
    assert set(known["rows"][-5]["seconds"]) == {
        "bare network",
        "reference",
        "native",
        "native, prepared",
    }


def test_sides_are_timed_in_turn():
    calls = []
    sides = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = alternate(sides, 2)
    assert calls == ["a", "b"] * 3
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "FR-ZF-07"), "a segmentation network, got FR-ZF-07, a detector"),
        (("--size", "512"), "size must be WIDTHxHEIGHT, such as 512x384, got '512'"),
        (("--size", "0x4"), "size must be WIDTHxHEIGHT, such as 512x384, got '0x4'"),
        (
            ("--model", "bench_victim:make", "--size", "9x8"),
            "--model bench_victim:make cannot take 9x8 pixels: ",
        ),
        (("--device", "tpu"), "--device must be cpu, cuda or cuda:NUMBER"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "bench_victim.py").write_text(
        "import torch\ndef make(): return torch.nn.Conv2d(3, 5, 80)"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["bench", "--rounds", "1", "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
