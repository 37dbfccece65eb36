"""Pictures of a run: the record that is read, the work units, and what the PNG files show."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from xbraid_py.recipes import pictures as report
from xbraid_py.recipes.pictures import curves, style

HEADER = {"kind": "header", "num_layers": 64}


def update_row(run, level, num_layers, update, seconds, **other):
    """One record of an update, as complete as a run writes it."""
    row = {"kind": "update", "run": run, "level": level, "num_layers": num_layers, "update": update}
    row |= {"work": 0.5 * (update + 1), "seconds": seconds, "objective": 1.5 / (update + 1), "loss": 1.4 / (update + 1)}
    row |= {"grad_norm": 0.1, "train_accuracy": 0.5, "val_accuracy": 0.9 - 0.5 / (update + 1)}
    row |= {"state_residual": 1e-3, "adjoint_residual": 1e-2, "step_size": 1.0, "evaluations": 1}
    return row | other


@pytest.fixture
def nested():
    return [
        update_row("nested", 1, 32, 0, 0.5),
        update_row("nested", 1, 32, 1, 1.0, val_accuracy=None, state_residual=None),
        update_row("nested", 0, 64, 2, 3.0, adjoint_residual=0.0),
        update_row("nested", 0, 64, 3, 5.0),
    ]


@pytest.fixture
def non_nested():
    return [update_row("non-nested", 0, 64, k, 4.0 * (k + 1)) for k in range(3)]


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved, beside its file."""
    saved = []
    savefig = Figure.savefig

    def keep(figure, *args, **kwargs):
        saved.append(figure)
        return savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def assert_picture(path, least=(500, 400)):
    """A PNG of a sensible size that is not all of one color."""
    pixels = imread(path)
    height, width = pixels.shape[:2]
    assert least[0] <= width <= 2000
    assert least[1] <= height <= 1200
    assert pixels[..., :3].std() > 0.05


# Lines of a picture: label -> (x, y).
def lines_of(axes):
    return {line.get_label(): tuple(map(list, line.get_data())) for line in axes.lines}


def test_work_unit_is_the_mean_update_of_the_non_nested_run(nested, non_nested):
    # Three updates in 12 seconds: a unit is 4 seconds.
    expected = [0.125, 0.25, 0.75, 1.25, 1.0, 2.0, 3.0]
    assert report.wall_work_units([HEADER, *nested, *non_nested]) == pytest.approx(expected, rel=1e-14)
    assert report.wall_work_units(non_nested) == pytest.approx([1.0, 2.0, 3.0], rel=1e-14)


def test_work_unit_without_that_run_is_the_mean_update_of_the_finest_level(nested):
    # Two fine updates between 1 and 5 seconds: a unit is 2 seconds.
    assert report.wall_work_units(nested) == pytest.approx([0.25, 0.5, 1.5, 2.5], rel=1e-14)
    assert report.wall_work_units(nested[2:]) == pytest.approx([1.2, 2.0], rel=1e-14)


def test_no_work_unit_without_fine_updates_or_time(nested):
    assert report.wall_work_units(nested[:2]) is None
    assert report.wall_work_units([row | {"seconds": 0.0} for row in nested]) is None


def test_accuracy_over_work(tmp_path, nested, non_nested, figures):
    path = tmp_path / "figures" / "accuracy.png"
    report.accuracy_over_work([*nested, *non_nested], path)
    assert_picture(path)
    wall, counted = figures[0].axes
    lines = lines_of(wall)
    assert list(lines) == ["32 layers", "64 layers", "64 layers, non-nested"]
    # The row that was not evaluated is left out; a level starts at the last point of the one before.
    assert lines["32 layers"] == ([0.125], [pytest.approx(40.0)])
    assert lines["64 layers"][0] == pytest.approx([0.125, 0.75, 1.25])
    assert lines_of(counted)["64 layers"][0] == pytest.approx([0.5, 1.5, 2.0])
    colors = [line.get_color() for line in wall.lines]
    assert colors[2] == style.RED
    assert len({tuple(np.atleast_1d(color)) for color in colors}) == 3


def test_accuracy_without_measured_work_or_evaluations(tmp_path, nested, figures):
    report.accuracy_over_work(nested[:2], tmp_path / "counted.png")
    assert len(figures[0].axes) == 1
    report.accuracy_over_work([nested[1]], tmp_path / "empty.png")
    assert [text.get_text() for text in figures[1].axes[0].texts] == ["validation accuracy was not evaluated"]
    assert_picture(tmp_path / "counted.png")


def test_convergence(tmp_path, nested, non_nested, figures):
    path = tmp_path / "convergence.png"
    report.convergence([*nested, *non_nested], path)
    assert_picture(path)
    objective, _, residual, _ = figures[0].axes
    assert (objective.get_yscale(), residual.get_yscale()) == ("linear", "log"), "by the factor that values span"
    drawn = lines_of(residual)
    assert drawn["states"][0] == [0, 2, 3]
    assert drawn["adjoints"][0] == [0, 1, 3]
    assert lines_of(objective)["32 layers"] == ([0, 1], [1.5, 0.75])
    marks = [line.get_xdata()[0] for line in objective.lines if line.get_linestyle() == ":"]
    assert marks == [1.5]


def test_convergence_without_residuals(tmp_path, non_nested, figures):
    rows = [row | {"state_residual": None, "adjoint_residual": 0.0} for row in non_nested]
    report.convergence(rows, tmp_path / "serial.png")
    assert_picture(tmp_path / "serial.png")
    assert [text.get_text() for text in figures[0].axes[1].texts] == [
        "the states are exact: no residual above 0 was recorded"
    ]


def minibatches(count, low, high):
    """Rows of training on minibatches whose losses go from one number to another."""
    losses = np.geomspace(low, high, count)
    rows = [{"kind": "update", "update": n + 1, "loss": loss, "stacks": []} for n, loss in enumerate(losses)]
    rows[-1] |= {"val_accuracy": 0.5, "val_loss": high, "train_accuracy": 0.6, "gradient_error": 0.01}
    return rows


@pytest.mark.parametrize(("low", "high", "kind"), [(2.25, 2.37, "linear"), (2.3, 0.1, "log"), (1.0, 1e-7, "log")])
def test_training_on_minibatches_has_a_panel_for_each_quantity(tmp_path, figures, low, high, kind):
    path = tmp_path / "training.png"
    curves.picture([HEADER, *minibatches(8, low, high)], path)
    assert_picture(path, least=(800, 600))
    panels = figures[0].axes
    assert [axes.get_ylabel() for axes in panels] == ["loss", "accuracy (%)", "gradient error,\nrelative"]
    bottoms = [round(axes.get_position().y0, 2) for axes in panels]
    assert len({*bottoms}) == 3, "none lies over another"
    assert panels[0].get_yscale() == kind
    for axes in panels:
        ticks = [label.get_text() for label in axes.get_yticklabels()]
        assert len(ticks) >= 2 and not any("$" in tick for tick in ticks), ticks
        legend = axes.get_legend()
        assert legend.get_window_extent().y0 >= axes.get_window_extent().y1 - 1, "above the curves, not on them"


@pytest.mark.parametrize("picture", [report.accuracy_over_work, report.convergence])
def test_picture_of_no_update(tmp_path, picture):
    with pytest.raises(ValueError, match=r"rows holds no update; .*\"kind\": \"update\""):
        picture([HEADER], tmp_path / "none.png")


def test_class_map(tmp_path, figures):
    true = np.arange(1600).reshape(40, 40) // 400
    predicted = true.copy()
    predicted[:4] = 4
    path = tmp_path / "class_map.png"
    report.class_map(predicted, true, "abcde", path)
    assert_picture(path)
    left, right = figures[0].axes
    assert np.array_equal(left.images[0].get_array(), true)
    assert np.array_equal(right.images[0].get_array(), predicted)
    assert left.images[0].origin == "lower"
    # The first point is x = y = -3, in the middle of its square.
    assert np.mean(left.images[0].get_extent()[:2]) == 0
    assert left.images[0].get_extent()[0] == pytest.approx(-3 - 3 / 39)
    assert right.get_title() == "learned classes: 90.0 % agree"
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == list("abcde")


@pytest.mark.parametrize(
    ("predicted", "error", "message"),
    [
        (np.zeros((3, 3)), TypeError, r"predicted is of type float64, must hold integers 0 \.\. 4"),
        (np.zeros((3, 4), dtype=int), ValueError, r"predicted.shape=\(3, 4\) must be square"),
        (np.zeros((4, 4), dtype=int), ValueError, r"predicted.shape=\(4, 4\) must be square and the same for both"),
        (np.full((3, 3), 5), ValueError, r"predicted holds 5 \.\. 5, must lie in 0 \.\. 4"),
        (np.full((3, 3), -1), ValueError, r"predicted holds -1 \.\. -1, must lie in 0 \.\. 4"),
    ],
)
def test_class_map_refuses(tmp_path, predicted, error, message):
    with pytest.raises(error, match=message):
        report.class_map(predicted, np.zeros((3, 3), dtype=int), "abcde", tmp_path / "none.png")


def test_scene_map(tmp_path, figures):
    true = np.arange(600).reshape(20, 30) // 200
    true[:, 25:] = -1
    predicted = np.maximum(true, 0)
    predicted[:2, :25] = 2
    path = tmp_path / "figures" / "classes.png"
    report.scene_map(predicted, true, "abc", path)
    assert_picture(path)
    left, right = figures[0].axes
    drawn = left.images[0].get_array()
    # Pixels without a label are left out on the left, and do not count.
    assert np.array_equal(drawn.mask, true < 0) and np.array_equal(drawn.compressed(), true[true >= 0])
    assert np.array_equal(right.images[0].get_array(), predicted)
    assert right.get_title() == "learned: 90.0 % of the labeled pixels agree"
    # Rows from the top, as in the file; the same color for a class on both sides and in the legend.
    assert left.images[0].origin == "upper"
    for image in (left.images[0], right.images[0]):
        assert (image.norm.vmin, image.norm.vmax) == (-0.5, 2.5)
    legend = figures[0].legends[0]
    assert [text.get_text() for text in legend.get_texts()] == list("abc")
    for number, patch in enumerate(legend.get_patches()):
        assert patch.get_facecolor() == pytest.approx(right.images[0].to_rgba(np.array([[number]]))[0, 0].tolist())


def test_scene_map_of_20_classes_has_as_many_colors(tmp_path, figures):
    true = np.arange(20).reshape(4, 5)
    report.scene_map(true, true, [f"class {k}" for k in range(20)], tmp_path / "map.png")
    assert len({patch.get_facecolor() for patch in figures[0].legends[0].get_patches()}) == 20


MAP = np.zeros((3, 4), dtype=int)


@pytest.mark.parametrize(
    ("predicted", "true", "count", "error", "message"),
    [
        (MAP + 0.0, MAP, 5, TypeError, r"predicted is of type float64, must hold integers 0 \.\. 4"),
        (MAP, MAP > 0, 5, TypeError, r"true is of type bool, must hold integers -1 \.\. 4"),
        (
            MAP,
            MAP.T,
            5,
            ValueError,
            r"true.shape=\(4, 3\) must be \(rows, columns\), the same for both; use \(145, 145",
        ),
        (MAP[0], MAP[0], 5, ValueError, r"predicted.shape=\(4,\) must be \(rows, columns\)"),
        (MAP[:0], MAP[:0], 5, ValueError, r"predicted.shape=\(0, 4\) must be \(rows, columns\)"),
        (MAP - 1, MAP, 5, ValueError, r"predicted holds -1 \.\. -1, must lie in 0 \.\. 4, the names"),
        (MAP + 5, MAP, 5, ValueError, r"predicted holds 5 \.\. 5, must lie in 0 \.\. 4, the names"),
        (MAP, MAP - 2, 5, ValueError, r"true holds -2 \.\. -2, must lie in -1 \.\. 4, the names"),
        (MAP, MAP + 5, 5, ValueError, r"true holds 5 \.\. 5, must lie in -1 \.\. 4, the names"),
        (MAP, MAP, 21, ValueError, r"names has 21 classes, more than colors; use at most 20"),
    ],
)
def test_scene_map_refuses(tmp_path, predicted, true, count, error, message):
    with pytest.raises(error, match=message):
        report.scene_map(predicted, true, ["a"] * count, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
