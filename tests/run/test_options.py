"""Options of a driver: precedence, spellings, conversions, help, and the message for whatever is wrong."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from xbraid_py.run.options import OptionError, from_dict, parse, to_dict, to_yaml


@dataclass(frozen=True, kw_only=True)
class Solver:
    """The solver.

    Parameters
    ----------
    cfactor : int or tuple of int
        Layers of an interval.
    tol : float
        Tolerance, not negative.
    warm_start : bool
        Begin from the last states.
    """

    cfactor: int | tuple[int, ...] = 4
    tol: float = 0.0
    warm_start: bool = False

    def __post_init__(self):
        if self.tol < 0:
            raise ValueError(f"tol={self.tol} must not be negative; use 0.0")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The experiment.

    Parameters
    ----------
    num_layers : int
        Number of layers.
    updates : tuple of int
        Weight updates of every level.
    activation : str
        Activation of the layers.
    data_dir : Path, optional
        Folder of the data files.
    resume : str, optional
        Checkpoint to go on from.
    smoke : bool
        A run of seconds.
    mgrit : Solver
        Forward solver.
    coarse : Solver, optional
        Another solver.
    """

    num_layers: int = 64
    updates: tuple[int, ...] = (200, 125, 75)
    activation: Literal["relu", "tanh"] = "tanh"
    data_dir: Path | None = None
    resume: str | None = None
    rate: float = 1.0
    smoke: bool = False
    mgrit: Solver = Solver(cfactor=8)
    coarse: Solver | None = None
    seeds: tuple[int, ...] | None = field(default=None)
    norm: Literal[1, 2, "max"] = 2
    labels: tuple[str, ...] | str = ""
    box: tuple[int, float] = (1, 0.5)

    def __post_init__(self):
        if isinstance(self.mgrit.cfactor, int) and self.num_layers % self.mgrit.cfactor:
            raise ValueError(f"num_layers={self.num_layers} is not a multiple of cfactor={self.mgrit.cfactor}; use 64")


def parsed(*words):
    return parse(Options, words, prog="peaks.py", description="Peaks.")


def message(*words):
    with pytest.raises(OptionError) as caught:
        parsed(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def config(tmp_path):
    def write(content, name="run.yaml"):
        path = tmp_path / name
        path.write_text(content)
        return str(path)

    return write


@pytest.mark.parametrize(
    "word, rule",
    [
        ("--rate=1e39", "must be 0, or 1e-30 to 1e+30 in size; use --rate=1.0"),
        ("--rate=-1e300", "must be 0, or 1e-30 to 1e+30 in size; use --rate=1.0"),
        ("--mgrit.tol=1e-320", "must be 0, or 1e-30 to 1e+30 in size; use --mgrit.tol=0.0"),
        ("--num_layers=18446744073709551616", "must be at most 1000000000000 in size; use --num_layers=64"),
        ("--updates=[5,-1000000000001]", "must be at most 1000000000000 in size; use --updates=200,125,75"),
        ("--box=1,1e-31", "must be 0, or 1e-30 to 1e+30 in size; use --box=1,0.5"),
    ],
)
def test_numbers_that_nothing_can_compute_with(word, rule, config):
    assert message(word) == f"{word} {rule}"
    name, _, value = word[2:].partition("=")
    assert rule.partition("; ")[0] in message(f"--config={config(f'{name}: {value}')}")
    with pytest.raises(OptionError, match="in size"):
        from_dict(Options, {name.partition(".")[0]: {"tol": 1e-320} if "." in name else yaml.safe_load(value)})


def test_nothing_given_is_the_defaults():
    assert parsed() == Options()


def test_command_line_beats_files_beats_defaults_in_any_order(config):
    first = config("num_layers: 16\nrate: 1e-3\nupdates: [1, 2]\nmgrit: {tol: 0.5, warm_start: true}\n", "a.yaml")
    second = config("rate: 2\nmgrit.tol: 0.25\n", "b.yaml")
    options = parsed("--num_layers=32", f"--config={first}", "--config", second)
    assert options == Options(
        num_layers=32, rate=2.0, updates=(1, 2), mgrit=Solver(cfactor=8, tol=0.25, warm_start=True)
    )
    assert isinstance(options.rate, float)


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--data-dir", "/x"], {"data_dir": Path("/x")}),
        (["--data_dir=3"], {"data_dir": Path("3")}),
        (["--resume=3"], {"resume": "3"}),
        (["--resume=a=b"], {"resume": "a=b"}),
        (["--resume=x", "--resume=null"], {}),
        (["--rate=1e-3"], {"rate": 0.001}),
        (["--rate", "-2"], {"rate": -2.0}),
        (["--smoke"], {"smoke": True}),
        (["--smoke", "--rate=3"], {"smoke": True, "rate": 3.0}),
        (["--smoke=true"], {"smoke": True}),
        (["--smoke", "true"], {"smoke": True}),
        (["--smoke", "--no-smoke"], {}),
        (["--smoke", "--smoke=false"], {}),
        (["--activation=relu"], {"activation": "relu"}),
        (["--updates=3,4"], {"updates": (3, 4)}),
        (["--updates=[3, 4]"], {"updates": (3, 4)}),
        (["--updates=3"], {"updates": (3,)}),
        (["--updates="], {"updates": ()}),
        (["--norm=1"], {"norm": 1}),
        (["--norm=max"], {"norm": "max"}),
        (["--labels=1,b"], {"labels": ("1", "b")}),
        (["--labels=['a, b', c]"], {"labels": ("a, b", "c")}),
        (["--labels=a"], {"labels": "a"}),
        (["--box=2,3"], {"box": (2, 3.0)}),
        (["--seeds=1,2"], {"seeds": (1, 2)}),
        (["--seeds=1", "--seeds=null"], {}),
        (["--mgrit.cfactor=2"], {"mgrit": Solver(cfactor=2)}),
        (["--mgrit.cfactor=2,4"], {"mgrit": Solver(cfactor=(2, 4))}),
        (["--mgrit.warm-start"], {"mgrit": Solver(cfactor=8, warm_start=True)}),
        (["--mgrit.warm_start", "--no_mgrit.warm_start"], {}),
        (["--mgrit={tol: 0.5}"], {"mgrit": Solver(cfactor=8, tol=0.5)}),
        (["--coarse.tol=1"], {"coarse": Solver(tol=1.0)}),
        (["--coarse.tol=1", "--coarse=null"], {}),
        (["--coarse=null", "--coarse.tol=1"], {"coarse": Solver(tol=1.0)}),
        # Valid only together: neither is tried alone.
        (["--num_layers=9", "--mgrit.cfactor=3"], {"num_layers": 9, "mgrit": Solver(cfactor=3)}),
    ],
)
def test_spellings(words, expected):
    assert parsed(*words) == Options(**expected)


def test_a_group_from_a_file_of_its_own(config):
    assert parsed(f"--mgrit={config('tol: 0.5')}") == Options(mgrit=Solver(cfactor=8, tol=0.5))


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--num_layer=3"], ["unknown option --num_layer;", "did you mean --num_layers?"]),
        (["--mgrit.cfactr=3"], ["unknown option --mgrit.cfactr;", "did you mean --mgrit.cfactor?"]),
        (["--cfactor", "3"], ["unknown option --cfactor;", "did you mean --mgrit.cfactor?"]),
        (["--confg=a"], ["did you mean --config?"]),
        (["--smok"], ["did you mean --smoke?"]),
        (["-smoke"], ["unknown option -smoke;", "did you mean --smoke?"]),
        (["--zzzz"], ["unknown option --zzzz;", "--help"]),
        (["--mgrit={cfactr: 3}"], ["unknown option mgrit.cfactr in", "did you mean mgrit.cfactor?"]),
        (["--updates", "1", "2"], ["'2' belongs to no option", "200,125,75"]),
        (["peaks"], ["'peaks' belongs to no option"]),
        (["--num-layers"], ["--num-layers needs a value; use --num-layers=64"]),
        (["--num_layers", "--smoke"], ["--num_layers needs a value"]),
        (["--config"], ["--config needs a value"]),
        (["--num-layers=abc"], ["--num-layers=abc is not an int; use --num_layers=64"]),
        (["--num_layers=3.5"], ["--num_layers=3.5 is not an int"]),
        (["--num_layers=null"], ["--num_layers=null is not an int"]),
        (["--rate=fast"], ["--rate=fast is not a float; use --rate=1.0"]),
        (["--rate=inf"], ["--rate=inf is not a float"]),
        (["--norm=3"], ["--norm=3 is not one of 1, 2, max; use --norm=2"]),
        (["--box=1"], ["--box=1 is not a list of float or int; use --box=1,0.5"]),
        (["--smoke=2"], ["--smoke=2 is not a bool (true or false); use --smoke=false"]),
        (["--activation=gelu"], ["--activation=gelu is not one of relu, tanh; use --activation=tanh"]),
        (["--updates=1,x"], ["--updates=1,x is not a list of int; use --updates=200,125,75"]),
        (["--mgrit.cfactor=2,x"], ["--mgrit.cfactor=2,x is not an int or a list of int; use --mgrit.cfactor=8"]),
        (["--coarse.tol=x"], ["--coarse.tol=x is not a float; use --coarse.tol=0.0"]),
        (["--mgrit=3"], ["--mgrit=3 is a group of options; use --mgrit.cfactor=8"]),
        (["--mgrit=null"], ["--mgrit=null is a group of options"]),
        (["--mgrit={"], ["--mgrit={ is not YAML"]),
        (["--mgrit.tol=-1"], ["tol=-1.0 must not be negative; use 0.0"]),
        (["--coarse.tol=-1"], ["tol=-1.0 must not be negative; use 0.0"]),
        (["--num_layers=9"], ["num_layers=9 is not a multiple of cfactor=8; use 64"]),
    ],
)
def test_one_message_for_what_is_wrong(words, parts):
    text = message(*words)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    "content, parts",
    [
        ("mgrit: {cfactr: 3}", ["unknown option mgrit.cfactr in ", "run.yaml; did you mean mgrit.cfactor?"]),
        ("num_layer: 3", ["unknown option num_layer in", "did you mean num_layers?"]),
        ("num_layers: many", ["num_layers=many in", "is not an int; use num_layers=64"]),
        ("updates: [1, a]", ["updates=1,a in", "is not a list of int; use updates=200,125,75"]),
        ("updates: 3", ["updates=3 in"]),
        ("updates:", ["updates=null in", "is not a list of int"]),
        ("num_layers: null", ["num_layers=null in", "is not an int; use num_layers=64"]),
        ("num_layers: true", ["num_layers=true in", "is not an int"]),
        ("norm: true", ["norm=true in", "is not one of 1, 2, max"]),
        ("resume: 3", ["resume=3 in", "is not a str or null"]),
        ("smoke: 1", ["smoke=1 in", "is not a bool"]),
        ("mgrit: 3", ["mgrit=3 in", "is a group of options; use mgrit.cfactor=8"]),
        ("mgrit: {tol: -1}", ["tol=-1.0 must not be negative"]),
        ("a: [1", ["run.yaml is not YAML"]),
        ("- 1", ["run.yaml holds no `name: value` lines"]),
    ],
)
def test_one_message_for_what_is_wrong_in_a_file(config, content, parts):
    text = message(f"--config={config(content)}")
    for part in parts:
        assert part in text


def test_unreadable_files(tmp_path):
    with pytest.raises(OptionError, match="--config=.*none.yaml cannot be read: No such file") as caught:
        parsed(f"--config={tmp_path / 'none.yaml'}")
    assert isinstance(caught.value.__cause__, OSError)
    assert "cannot be read: Is a directory" in message("--config", str(tmp_path))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read: not a text file" in message(f"--config={tmp_path / 'binary'}")


def test_an_empty_file_changes_nothing(config):
    assert parsed(f"--config={config('')}") == Options()


def test_an_option_without_default_is_asked_for():
    @dataclass(frozen=True)
    class Needy:
        depth: int

    assert parse(Needy, ["--depth=3"]) == Needy(3)
    with pytest.raises(OptionError, match="--depth must be given"):
        parse(Needy, [])
    with pytest.raises(OptionError, match="--depth=x is not an int; use --depth=1"):
        parse(Needy, ["--depth=x"])


def printed(capsys, *words):
    with pytest.raises(SystemExit) as end:
        parsed(*words)
    assert end.value.code == 0
    out, err = capsys.readouterr()
    assert not err
    return out


def test_help_comes_from_the_docstrings(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = " ".join(printed(capsys, "--num_layers=3", "--help").split())
    for part in [
        "usage: peaks.py [--config FILE]",
        "Peaks.",
        "--print_config",
        "The experiment: --num_layers Number of layers. [an int; default: 64]",
        "--updates Weight updates of every level. [a list of int; default: 200,125,75]",
        "--activation Activation of the layers. [one of relu, tanh; default: tanh]",
        "mgrit: Forward solver. --mgrit A YAML file",
        "--mgrit.cfactor Layers of an interval. [an int or a list of int; default: 8]",
        "coarse: Another solver. --coarse A YAML file of these, or {name: value, ...}, or null [default: null].",
        "--coarse.cfactor Layers of an interval. [an int or a list of int; default: 4]",
        "--coarse.tol Tolerance, not negative. [a float; default: 0.0]",
        "--rate [a float; default: 1.0]",  # nothing is written of it
    ]:
        assert part in text


def test_help_says_what_bases_say_and_what_must_be_given(capsys, monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Derived(Solver):
        """More of it.

        Parameters
        ----------
        left, right : int
            Of both sides: 100 % of
            them.
        tol : float
            Another one.

        Attributes
        ----------
        right : int
            Not to be shown.
        """

        left: int
        right: int = 2

    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parse(Derived, ["--help"], prog="p")
    text = " ".join(capsys.readouterr().out.split())
    assert "--left Of both sides: 100 % of them. [an int; must be given]" in text
    assert "--right Of both sides: 100 % of them. [an int; default: 2]" in text
    assert "--tol Another one. [" in text and "--cfactor Layers of an interval. [" in text
    assert "Not to be shown" not in text


@pytest.mark.parametrize("columns", [60, 120])
def test_help_is_as_wide_as_the_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    widths = [len(line) for line in printed(capsys, "--help").splitlines()]
    assert columns - 12 < max(widths) <= columns


def test_printed_configuration_is_a_configuration(capsys, config):
    words = ["--mgrit.cfactor=2,4", "--data_dir=/x", "--rate=1e-5", "--coarse.tol=3", "--smoke", "--labels=a,1"]
    text = printed(capsys, *words, "--print_config")
    assert parsed(f"--config={config(text)}") == parsed(*words)


def test_only_the_first_rank_prints(capsys, monkeypatch):
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "2")
    assert printed(capsys, "--help") == ""
    assert printed(capsys, "--print_config") == ""


def test_options_as_plain_data():
    options = Options(data_dir=Path("/x"), coarse=Solver(cfactor=(2, 4)))
    plain = to_dict(options)
    assert json.loads(json.dumps(plain)) == plain
    assert plain["updates"] == [200, 125, 75] and plain["data_dir"] == "/x"
    assert plain["coarse"] == {"cfactor": [2, 4], "tol": 0.0, "warm_start": False}
    assert to_yaml(options).startswith("num_layers: 64\nupdates:\n- 200\n")


@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(
            data_dir=Path("/x"), coarse=Solver(cfactor=(2, 4)), seeds=(), norm="max", labels=("a", "b"), box=(3, 4.0)
        ),
        Options(mgrit=Solver(cfactor=(4, 2), tol=1e-9, warm_start=True), resume="auto", rate=float("inf")),
    ],
)
def test_options_from_plain_data(options):
    assert from_dict(Options, to_dict(options)) == options
    assert from_dict(Options, json.loads(json.dumps(to_dict(options)))) == options


def test_of_plain_data_what_is_missing_has_its_default():
    assert from_dict(Options, {}) == Options()
    assert from_dict(Options, {"mgrit": {"tol": 0.5}}) == Options(mgrit=Solver(cfactor=8, tol=0.5))
    assert from_dict(Options, {"coarse": {"tol": 0.5}}) == Options(coarse=Solver(tol=0.5))
    assert from_dict(Options, {"coarse": Solver(tol=0.5)}) == Options(coarse=Solver(tol=0.5))


@pytest.mark.parametrize(
    "values, said",
    [
        ({"num_layer": 3}, "unknown option num_layer of Options; did you mean num_layers?"),
        ({"mgrit": {"cfactr": 3}}, "unknown option mgrit.cfactr of Options; did you mean mgrit.cfactor?"),
        ({"num_layers": "many"}, "num_layers=many of Options is not an int; use num_layers=64"),
        ({"mgrit": None}, "mgrit=null of Options is a group of options; use mgrit.cfactor=8"),
    ],
)
def test_plain_data_that_are_no_options(values, said):
    with pytest.raises(OptionError) as caught:
        from_dict(Options, values)
    assert str(caught.value) == said


def test_options_need_no_torch():
    code = """
import sys
from dataclasses import dataclass
from xbraid_py.run.options import parse

@dataclass(frozen=True)
class Options:
    width: int = 3

assert parse(Options, ["--width=4"]).width == 4
print([name for name in ("torch", "numpy", "mpi4py", "argparse") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
