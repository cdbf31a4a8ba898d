"""sea-2024 against a plain implementation of SEA: the same numbers from the same random points."""

import pytest
import sea_oracle
import torch
from torch import nn

import dagcore
from dagcore import APGD
from dagcore.evaluation.protocols import PROTOCOLS
from dagcore.seeds import seed_of

CLASSES, EPSILON = 4, 26 / 255


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, CLASSES, 3, padding=1)
    ).double()


def examples(net, count):
    rng = torch.Generator().manual_seed(5)
    found = []
    for _ in range(count):
        image = torch.rand((3, 9, 11), generator=rng).double()
        noise = 0.1 * torch.randn(image.shape, generator=rng, dtype=torch.float64)
        with torch.no_grad():
            labels = net((image + noise)[None])[0].argmax(0)
        labels[:2, :2] = 255
        found.append((image, labels))
    return found


def test_sea_2024_is_what_a_plain_implementation_finds(tmp_path):
    net = network()
    data = examples(net, 3)
    summary = dagcore.evaluate(
        net, data, "sea-2024", epsilon=EPSILON, out=tmp_path / "out", check=0, prepare=False
    )
    weights = sea_oracle.class_weights([labels for _, labels in data], CLASSES)
    tables, entries = {}, PROTOCOLS["sea-2024"].attacks
    for position, (name, entry) in enumerate(zip(sea_oracle.LOSSES, entries, strict=True)):
        rule = entry.build(EPSILON)
        assert isinstance(rule, APGD)
        tables[name] = []
        for number, (image, labels) in enumerate(data):
            start = rule.random_point(image, seed_of((0, number, position)), 0)
            example = sea_oracle.attack(
                net, image, labels, name, weights.double(), EPSILON, 300, start
            )
            tables[name].append(sea_oracle.table(net, example, labels, CLASSES))
        (own,) = (
            one
            for one in summary["results"]
            if (one["attack"], one["stage"]) == (entry.name, "memory")
        )
        hits, _, true = torch.stack(tables[name]).sum(0).sum(0).tolist()
        assert own["aAcc"] == pytest.approx(100 * hits / true)
        assert own["mIoU"] == pytest.approx(sea_oracle.miou(tables[name]))
    right = torch.stack([torch.stack(one)[:, :, 0].sum(1) for one in tables.values()])
    (worst,) = (one for one in summary["worst_case"] if one["stage"] == "memory")
    assert worst["aAcc"] == pytest.approx(100 * int(right.min(0).values.sum()) / true)
    assert worst["mIoU"] <= sea_oracle.worst_miou(list(tables.values())) + 1e-4
    assert summary["cost"]["forward"] <= 909
    assert worst["aAcc"] < summary["clean"]["aAcc"] - 5
