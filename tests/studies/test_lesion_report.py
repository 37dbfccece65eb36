"""Tables and pictures of lesions and norms: fits of known powers, numbers of rows made by hand, files."""

import numpy as np
import pytest
from studies.lesion import figures as lesion_figures
from studies.lesion import tables as lesion_tables


def test_fit_of_known_powers():
    sizes = [6, 12, 24, 48]
    assert lesion_tables.fit_power(sizes, [30.0 / d for d in sizes]) == pytest.approx((-1.0, 30.0))
    # Disturbed alike at both ends, with the least squares' formula beside it.
    values = [5.0 * d**0.5 * (1.1 if d in (6, 48) else 0.9) for d in sizes]
    x, y = np.log(sizes), np.log(values)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    assert lesion_tables.fit_power(sizes, values)[0] == pytest.approx(slope) == pytest.approx(0.5)
    for bad, match in (([6, 6], "sizes="), ([6, 12, 24], "sizes="), ([6, 0], "sizes=.* positive")):
        with pytest.raises(ValueError, match=match):
            lesion_tables.fit_power(bad, [1.0, 2.0])
    with pytest.raises(ValueError, match=r"^values=\[1.0, nan\] must be positive and finite"):
        lesion_tables.fit_power([6, 12], [1.0, float("nan")])


def row_of(per_stage, h, seed=0, **settings):
    """Norms of G are 60/d at h=1, and F's are 4; without a transition 20 points are lost, otherwise k in order."""
    blocks = [per_stage] * 2
    d = 2 * per_stage
    norms = [[s, j, 100.0, 60.0 / d if h == 1 else 4.0 * h] for s in range(2) for j in range(per_stage)]
    left = [0.7 if s and not j else 0.9 - 0.01 * k - 0.02 * seed for k, (s, j, *_) in enumerate(norms)]
    result = {
        "accuracy": 0.9,
        "norms": norms,
        "left_out": left,
        "random": {"1": [0.85, 0.83], "2": [0.8, 0.6]},
        "shuffled": [0.5, 0.3],
    }
    given = {"data": "cifar10", "model": "first", "filters": [4, 8], "norm": "batch"} | settings
    return {"settings": {"blocks": blocks, "step_size": h, "seed": seed} | given, "result": result}


ROWS = [row_of(2, 1), row_of(4, 1), row_of(8, 1), row_of(4, 0.5), row_of(8, 0.25), row_of(8, 1, seed=1)]


def test_tables():
    text = lesion_tables.page(ROWS)
    assert lesion_tables.slope_lines(ROWS) == [
        "* h = 1, d = 4, 8, 16: the mean norm of G goes as d^-1.00, that of G/Y as d^-1.00 (1/d is d^-1)",
        # 15, then 2 and 1: the least squares through three equidistant points is that of the two at the ends.
        "* h d = 4, d = 4, 8, 16: the mean norm of G goes as d^-1.95, that of G/Y as d^-1.95 (1/d is d^-1)",
    ]
    assert "| 4-4, h = 0.5 | 8 | 1 | 90.0 | 2.000 | 4.000 | 0.0200 |" in text
    # Of 4-4 the late blocks are 2, 3, 6 and 7, the other ones 0, 1 and 5.
    assert "| 4-4, h = 0.5 | 90.0 | 20.0 | 4.5 | 7.0 | 2.0 | 1 of 1 |" in text
    # Of 8-8 they are 4 to 7 and 12 to 15; with the second seed all but the transition lose two points more.
    assert "| 8-8, h = 1 | 90.0 ± 0.0 | 20.0 ± 0.0 | 10.5 ± 1.4 | 16.0 ± 1.4 |" in text and "| 2 of 2 |" in text
    assert "| 4-4, h = 1 | 90.0 | 84.0 ± 1.4 | 70.0 ± 14.1 | 40.0 ± 14.1 |" in text
    with pytest.raises(ValueError, match="^rows holds no network"):
        lesion_tables.page([])
    assert "no slope" in lesion_tables.page(ROWS[:1])


def test_what_is_claimed_of_late_blocks():
    row = row_of(4, 1)
    assert lesion_tables.claim_holds(row) is True
    row["result"]["left_out"][4] = 0.89  # a transition that hardly matters
    assert lesion_tables.claim_holds(row) is False
    # A lesion that helps changes the accuracy as well.
    row["result"]["left_out"][4] = 0.99
    assert lesion_tables.claim_holds(row) is True
    assert lesion_tables.claim_holds(row_of(1, 1)) is None and lesion_tables.kind(0, 0, (1, 1)) == "other"


def test_networks_that_differ_in_more_are_told_apart():
    rows = [row_of(2, 1, model="last"), row_of(2, 1, model="multilevel"), row_of(4, 1, model="last")]
    assert list(lesion_tables.networks(rows)) == ["2-2, h = 1, last", "2-2, h = 1, multilevel", "4-4, h = 1, last"]
    assert list(lesion_tables.series(rows)) == ["h = 1, last"]
    assert list(lesion_tables.networks([row_of(2, 1, filters=[2, 4]), row_of(2, 1)])) == [
        "2-2, h = 1, 2-4",
        "2-2, h = 1, 4-8",
    ]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]], ids=["several", "one"])
def test_pictures(tmp_path, rows):
    lesion_figures.write(rows, tmp_path / "new")
    found = {path.name: path.read_bytes()[:4] for path in (tmp_path / "new").iterdir()}
    assert found == dict.fromkeys(lesion_figures.FIGURES, b"\x89PNG")
    for draw in (lesion_figures.figure4, lesion_figures.lesions):
        with pytest.raises(ValueError, match="^rows holds no network"):
            draw([], tmp_path / "none.png")
