"""Every numeric option of every program at its edges: one sentence that names it, or a set-up that takes little memory.

The options are found from the dataclasses of the programs. All of a program are tried in one process, whose memory has
a limit, and which says at its end what is wrong.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import traceback
import typing
from collections.abc import Iterator

import pytest
from kinds import KINDS, program, words_of
from model_zoo import package
from processes import PROJECT

from xbraid_py.comm import SerialCommunicator
from xbraid_py.run import memory
from xbraid_py.run.options import flat, parse, to_dict

DRIVERS = sorted(path.stem for path in (PROJECT / "drivers").glob("*.py"))
INTS, FLOATS = ("-1", "0", "1000000000000", "18446744073709551616"), ("-1.0", "1e-320", "1e-30", "1e30", "1e300")
GIGABYTE = 2**30
# An option of a group that has to be given first; what is said of it is said of the group's other one.
WITH = {"network.splines.degree": "--network.splines.num=10"}


def base(driver: str, out) -> list[str]:
    """The words of a small job."""
    kind = next((kind for kind in KINDS.values() if kind.driver == driver), None)
    if kind is not None:
        return words_of(kind, out)
    return [f"--out={out}", *["--smoke"] * ("smoke" in (program(driver).PRESETS or {}))]


def cases(options: type, group: str = "") -> Iterator[tuple[str, str]]:
    """Names and values, those of groups of options too."""
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        kinds, name = set(parts(hints[field.name])), group + field.name
        for kind in filter(dataclasses.is_dataclass, kinds):
            yield from cases(kind, f"{name}.")
        for kind, values in ((int, INTS), (float, FLOATS)):
            yield from ((name, value) for value in values if kind in kinds)


def parts(hint: object) -> Iterator[object]:
    """The types in unions and lists."""
    if typing.get_origin(hint) in (None, typing.Literal):
        yield hint
    else:
        for each in typing.get_args(hint):
            yield from parts(each)


def wrong_of(driver: str, out, log) -> list[str]:
    """Whatever is not as it should be; to be called in a process of its own."""
    module, wrong = program(driver), []
    usual = flat(to_dict(parse(module.Options, base(driver, out), presets=module.PRESETS)))
    for name, value in cases(module.Options):
        if isinstance(usual.get(name), list):  # as many as there are
            value = ",".join([value, *map(str, usual[name][1:])])
        words = [*base(driver, out), *([WITH[name]] if name in WITH else []), f"--{name}={value}"]
        signal.alarm(60)  # seconds, for what takes some tenths
        log.write_text(words[-1])
        try:
            options = parse(module.Options, words, presets=module.PRESETS)
            memory.within(module.setup, options, SerialCommunicator())
        except ValueError as error:
            said = str(error)
            if name.split(".")[-1] not in said or len(said) > 500 or "\n" in said:
                wrong.append(f"{words[-1]}: {said}")
        except BaseException as error:  # noqa: BLE001  whatever it is, it is what this looks for
            at = traceback.extract_tb(error.__traceback__)[-1]
            wrong.append(f"{words[-1]}: {type(error).__name__} {str(error)[:200]} at {at.filename}:{at.lineno}")
    return wrong


@pytest.mark.timeout(300)
@pytest.mark.parametrize("driver", DRIVERS)
def test_numbers_at_the_edge(driver, tmp_path):
    if driver == "finetune":
        package("transformers")
    program(driver), base(driver, tmp_path)  # what the process needs is there before its memory is limited
    found, log = tmp_path / "found", tmp_path / "log"
    child = os.fork()
    if child == 0:
        try:
            pages = int(open("/proc/self/statm").read().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + GIGABYTE,) * 2)
            found.write_text(json.dumps(wrong_of(driver, tmp_path / "out", log)))
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"ended with {status} at {log.read_text()}"
    assert json.loads(found.read_text()) == []
