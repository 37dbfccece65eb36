"""Tables 3 and 4 and figure 6 of multi-level residual networks, from rows of runs."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure
from multi_level_rows import points, row, settings
from studies.multi_level import curves as multi_level_curves
from studies.multi_level.curves import figure6, mean_curve
from studies.multi_level.tables import name_of, page, result_of, saved

from xbraid_py.recipes.pictures import style


@pytest.mark.parametrize(
    ("model", "changes", "name"),
    [
        ("first", {}, "ResNet-14"),
        ("last", {}, "ResNet-50"),
        ("multilevel", {"wide": True}, "WResNet-50-i"),
        ("last", {"blocks": [5, 5, 5]}, "ResNet-122"),
        ("multilevel", {"blocks": (5, 5, 5), "filters": (32, 64, 128)}, "WResNet-122-i"),
        ("first", {"filters": [4, 8, 16]}, "ResNet-14 (4-8-16)"),
    ],
)
def test_names_are_those_of_the_paper(model, changes, name):
    assert name_of(settings(model, **changes)) == name


def test_results_are_those_of_the_end():
    result = result_of(points(0.4, 30.0, 100, untested=(4,)))
    assert (result["val_error"], result["seconds"], result["block_evaluations"]) == (0.5 / 3, 120.0, 400)
    assert result["best_val_error"] == 0.5 / 3 and result["train_error"] == 0.1
    assert [point[0] for point in result["curve"]] == [1, 2, 3, 4] and result["curve"][3][6] is None
    with pytest.raises(ValueError, match="^points holds no epoch"):
        result_of([])


def test_the_table():
    rows = [
        row("first", 0.6, 10.0, 25),
        row("last", 0.4, 40.0, 100),
        row("multilevel", 0.44, 22.0, 50),
        row("last", 0.42, 60.0, 100, seed=1),
        row("multilevel", 0.36, 36.0, 50, seed=1),
        row("multilevel", seed=2),  # nothing to compare it with
        {"settings": settings("last", seed=3), "failure": "epoch 1: the loss is nan"},
    ]
    lines = page(rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:5]]
    assert cells[0] == ["ResNet-14", "2-2-2", "CIFAR-10", "1", "18.75", "9.75", "40.0 s", "38 min", "75.0", "75.0", ""]
    assert cells[1][:6] == ["ResNet-50", "8-8-8", "CIFAR-10", "2", "12.81 ± 0.44", "7.58"]
    assert cells[1][6:] == ["3.3 ± 0.9 min", "114 min", "", "", ""]
    assert cells[2][:6] == ["ResNet-50-i", "2-2-2 to 8-8-8", "CIFAR-10", "3", "12.50 ± 1.25", "7.10"]
    assert cells[2][8:] == ["42.5 ± 3.5", "50.0 ± 0.0", "41"]
    assert lines[-1] == "ResNet-50, seed 3: epoch 1: the loss is nan"
    assert saved(rows)[next(reversed(saved(rows)))] == pytest.approx([0.45, 0.4])


def test_data_sets_and_other_networks_have_lines_of_their_own():
    wide = {"wide": True, "data": "stl10"}
    rows = [row("last", seconds=40.0, **wide), row("multilevel", seconds=20.0, **wide), row("last", filters=[8, 8, 8])]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page(rows).splitlines()[2:]]
    assert [line[0] for line in cells] == ["WResNet-50", "WResNet-50-i", "ResNet-50 (8-8-8)"]
    assert [line[2] for line in cells] == ["STL-10", "STL-10", "CIFAR-10"]
    assert [line[5] for line in cells] == ["23.82", "22.82", ""] and [line[10] for line in cells] == ["", "41", ""]
    with pytest.raises(ValueError, match="^rows holds no run"):
        page([])


def test_means_over_runs():
    rows = [points(0.4, 30.0, 100), points(0.2, 10.0, 100, untested=(2,))[:3]]
    curve = mean_curve(rows)
    assert len(curve) == 3 and curve[0]["val_error"] == pytest.approx(0.375)
    assert curve[1]["val_error"] is None and curve[2]["seconds"] == 60.0


def test_the_picture(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(
        multi_level_curves, "save", lambda figure, path: (figures.append(figure), style.save(figure, path))
    )
    rows = [
        row("multilevel"),
        row("multilevel", 0.2, seed=1),
        row("last", untested=(1, 2)),
        {"settings": {}, "failure": ""},
    ]
    figure6(rows, tmp_path / "new" / "figure6.png", ("epoch", "seconds", "block_evaluations"), log=True)
    assert (tmp_path / "new" / "figure6.png").read_bytes()[:4] == b"\x89PNG"
    (figure,) = figures
    assert isinstance(figure, Figure)
    for axes, field in zip(figure.axes, ("epoch", "seconds", "block_evaluations"), strict=True):
        named = {each.get_label(): each for each in axes.lines if not each.get_label().startswith("_")}
        assert set(named) == {"multilevel, train", "multilevel, test", "last, train", "last, test"}
        x, y = named["multilevel, test"].get_data()
        assert y[0] == pytest.approx(37.5) and len(named["last, test"].get_xdata()) == 2
        assert x[-1] == {"epoch": 4, "seconds": 120.0, "block_evaluations": 400}[field]
    begins = [each.get_xdata()[0] for each in figure.axes[0].lines if each.get_label().startswith("_")]
    assert begins == [2, 3]
    with pytest.raises(ValueError, match="^rows holds no finished run"):
        figure6(rows[3:], tmp_path / "none.png")
