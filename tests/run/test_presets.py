"""Presets: small jobs as a flag of the command line and of files, which stands for other defaults."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from xbraid_py.run.options import OptionError, parse, to_yaml


@dataclass(frozen=True, kw_only=True)
class Solver:
    """A group of options."""

    cfactor: int | tuple[int, ...] = 4
    tol: float = 0.0
    warm_start: bool = False

    def __post_init__(self):
        if self.tol < 0:
            raise ValueError(f"tol={self.tol} must not be negative; use 0.0")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job with presets."""

    num_layers: int = 64
    out: Path = Path("runs/job")
    mgrit: Solver = Solver(cfactor=8)
    coarse: Solver | None = None


PRESETS = {
    "smoke": {"num_layers": 16, "mgrit": Solver(cfactor=4, tol=0.5), "coarse.tol": 1.0},
    "deep": {"num_layers": 1024, "mgrit.cfactor": (16, 4)},
}
SMALL = Job(num_layers=16, mgrit=Solver(cfactor=4, tol=0.5), coarse=Solver(tol=1.0))


def preset(*words, presets=PRESETS):
    return parse(Job, words, presets=presets, prog="job.py")


@pytest.fixture
def config(tmp_path):
    def write(content, name="run.yaml"):
        path = tmp_path / name
        path.write_text(content)
        return str(path)

    return write


@pytest.mark.parametrize(
    "files, words, expected",
    [
        ([], ["--smoke"], SMALL),
        ([], ["--smoke=true"], SMALL),
        ([], ["--smoke", "yes"], SMALL),
        (["smoke: true"], [], SMALL),
        ([], [], Job()),
        ([], ["--smoke=false"], Job()),
        ([], ["--no_smoke"], Job()),
        ([], ["--no-smoke"], Job()),
        (["smoke: false"], [], Job()),
        # The last one wins, and the command line over files, wherever it stands.
        ([], ["--smoke", "--smoke=false"], Job()),
        ([], ["--no_smoke", "--smoke"], SMALL),
        (["smoke: true", "smoke: false"], [], Job()),
        (["smoke: true"], ["--no_smoke"], Job()),
        (["smoke: false"], ["--smoke"], SMALL),
    ],
)
def test_a_preset_is_switched_like_any_flag(config, files, words, expected):
    files = [f"--config={config(content, f'{number}.yaml')}" for number, content in enumerate(files)]
    assert preset(*files, *words) == preset(*words, *files) == expected


def test_a_preset_is_defaults(config):
    file = config("{num_layers: 32, mgrit: {tol: 0.25}, smoke: true}")
    for words in (["--smoke", f"--config={file}", "--num_layers=8"], ["--num_layers=8", f"--config={file}"]):
        options = preset(*words)
        assert options == Job(num_layers=8, mgrit=Solver(cfactor=4, tol=0.25), coarse=Solver(tol=1.0))
    assert preset("--smoke", "--mgrit.warm_start").mgrit == Solver(cfactor=4, tol=0.5, warm_start=True)
    assert preset("--coarse=null", "--smoke").coarse is None
    assert preset("--coarse.cfactor=2", "--smoke").coarse == Solver(cfactor=2, tol=1.0)


def test_of_two_presets_the_later_one_counts():
    both = Job(num_layers=1024, mgrit=Solver(cfactor=(16, 4), tol=0.5), coarse=Solver(tol=1.0))
    assert preset("--deep", "--smoke") == preset("--smoke", "--deep") == both
    nothing = {"smoke": {"coarse": Solver(tol=1.0)}, "alone": {"coarse": None}}
    assert preset("--smoke", "--alone", presets=nothing) == Job()


def test_a_preset_is_no_field(capsys, config):
    with pytest.raises(SystemExit):
        preset("--smoke", "--out=x", "--print_config")
    content = capsys.readouterr().out
    assert "smoke" not in content and "num_layers: 16" in content
    for words in ([], ["--smoke"], ["--deep"]):
        assert to_yaml(preset(f"--config={config(content)}", *words)) == content


@pytest.mark.parametrize(
    "content, words, said",
    [
        ("smoke: 1", [], "is not a bool (true or false); use smoke=false"),
        ("smok: true", [], "did you mean smoke?"),
        ("", ["--smok"], "unknown option --smok; did you mean --smoke?"),
        ("", ["--smoke=2"], "--smoke=2 is not a bool (true or false); use --smoke=false"),
        ("smoke: true", ["--num_layers=x"], "--num_layers=x is not an int; use --num_layers=16"),
        ("smoke: true", ["--mgrit.tol=-1"], "tol=-1.0 must not be negative"),
    ],
)
def test_one_message_for_what_is_wrong_with_a_preset(config, content, words, said):
    with pytest.raises(OptionError) as caught:
        preset(f"--config={config(content)}", *words)
    assert said in str(caught.value)


def test_an_unknown_preset_is_an_unknown_option(config):
    with pytest.raises(OptionError, match="unknown option smoke in"):
        preset(f"--config={config('smoke: true')}", presets={})
    with pytest.raises(OptionError, match="unknown option --smoke;"):
        preset("--smoke", presets=None)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"smoke": {"num_layer": 3}}, "unknown option num_layer in the preset smoke; did you mean num_layers?"),
        ({"smoke": {"mgrit.cfactr": 3}}, "unknown option mgrit.cfactr in the preset smoke; did you mean"),
        ({"smoke": {"mgrit": Job()}}, "is a group of options; use mgrit.cfactor=8"),
        ({"smoke": {"num_layers": 1.5}}, "num_layers=1.5 in the preset smoke is not an int; use num_layers=64"),
        ({"out": {}}, "preset 'out' has the name of an option"),
        ({"mgrit": {}}, "preset 'mgrit' has the name of an option"),
        ({"config": {}}, "preset 'config' has the name of an option"),
    ],
)
def test_a_wrong_preset_is_the_programs_mistake(values, said):
    # Known at once, whether it is asked for or not; no message to whoever calls the program.
    with pytest.raises(ValueError, match="preset|group") as caught:
        preset(presets=values)
    assert not isinstance(caught.value, OptionError)
    assert said in str(caught.value)


def test_help_says_what_a_preset_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        preset("--help")
    text = " ".join(capsys.readouterr().out.split())
    said = "--smoke A job of seconds: other defaults, each of which may still be given."
    assert f"{said} [num_layers=16, mgrit.cfactor=4, mgrit.tol=0.5, coarse.tol=1.0]" in text
