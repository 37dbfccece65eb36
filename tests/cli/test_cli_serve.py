"""The server of `xbraid-py serve`: what it hands out, to whom, and what it does not."""

import json
import os
import re
import urllib.request
from pathlib import Path

import pytest
from runs_on_disk import make_run, minibatch_rows, nested_rows, status
from served import server

from xbraid_py.cli import main
from xbraid_py.cli.queue import Queue
from xbraid_py.cli.serve import PAGE, hierarchy, make_app

testclient = pytest.importorskip("starlette.testclient")
EVIL = "<script>alert(1)</script>"


def client(folder: Path, token: str | None = None, is_local: bool = True, host: str = "127.0.0.1:8421"):
    return testclient.TestClient(make_app(folder, token, is_local), base_url=f"http://{host}", follow_redirects=False)


@pytest.fixture
def room(tmp_path):
    folder = tmp_path / "runs"
    make_run(folder / "deep" / "one", said=status("stopped", message=EVIL), title=EVIL)
    make_run(folder / "two", minibatch_rows())
    (folder / "two" / "log.txt").write_text(f"{EVIL}\n\x1b[31mred\n")
    (tmp_path / "secret.txt").write_text("not for you")
    return folder


def test_the_list_and_a_run(room):
    asked = client(room)
    found = asked.get("/api/runs").json()
    assert [run["name"] for run in found["runs"]] == ["deep/one", "two"]
    one, two = found["runs"]
    assert (one["state"], one["can_stop"], one["can_resume"]) == ("stopped", False, True)
    assert (two["state"], two["can_stop"], two["can_resume"], two["accuracy"]) == ("running", True, False, 0.875)
    about = asked.get("/api/run", params={"name": "deep/one"}).json()
    assert about["options"]["mgrit.cycle"] == "V" and about["options"]["title"] == EVIL
    assert about["figures"] == ["classes.png"] and about["checkpoints"] == ["update_000010.h5"]
    picture = asked.get("/api/figure", params={"name": "deep/one", "file": "classes.png"})
    assert picture.headers["content-type"] == "image/png" and picture.content.startswith(b"\x89PNG")


def test_what_files_say_is_never_a_page(room):
    asked = client(room)
    for path in ("/api/runs", "/api/run?name=deep/one", "/api/log?name=two", "/api/run?name=two"):
        answer = asked.get(path)
        assert re.match(r"application/json|text/plain", answer.headers["content-type"])
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'; script-src 'self'" in answer.headers["content-security-policy"]
    assert asked.get("/api/log?name=two").text.splitlines() == [EVIL, "[31mred"], "no letters that a terminal obeys"
    # The page makes text nodes of it: there is no other way in its sources.
    for path in PAGE.iterdir():
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|https?://(?!www\.w3)", path.read_text()
        )


def test_all_of_the_page_is_here(room):
    asked = client(room)
    page = asked.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for name in re.findall(r'(?:src|href)="([\w.]+)"', page.text):
        assert asked.get(f"/{name}").status_code == 200
    assert asked.get("/../serve.py").status_code == 404 and asked.get("/serve.py").status_code == 404


@pytest.mark.parametrize(
    "name",
    [
        *("..", "../secret.txt", "deep/../../", "/etc", "", ".", "two/../../runs/two", "link", "nowhere", "two\0"),
        *("linked-record", "linked-figures", "linked-log", "deep"),
    ],
)
def test_nothing_outside_the_folder(room, tmp_path, name):
    outside = make_run(tmp_path / "outside")
    (room / "link").symlink_to(outside)
    for what in ("record", "figures", "log"):
        run = make_run(room / f"linked-{what}")
        target = run / {"record": "metrics.jsonl", "figures": "figures", "log": "log.txt"}[what]
        os.rename(target, tmp_path / f"{what}-of-it")
        target.symlink_to(tmp_path / f"{what}-of-it")
    asked = client(room)
    for path in ("run", "log", "figure"):
        answer = asked.get(f"/api/{path}", params={"name": name, "file": "classes.png"})
        if (path, name) in (("log", "deep"), ("log", ".")):  # a folder that holds no run has no log
            assert answer.text == ""
        else:
            assert answer.status_code == 404 and "not for you" not in answer.text, (path, answer.text)
    # Where the queue has a job that writes elsewhere, the list has what the queue says of it, and no more.
    Queue(room).add({"program": ["x.py"], "ranks": 1, "on": "slurm", "out": str(outside)})
    listed = {run["name"]: run for run in asked.get("/api/runs").json()["runs"]}
    assert {*listed} == {"deep/one", "two", str(outside)}
    assert (listed[str(outside)]["state"], listed[str(outside)]["objective"]) == ("waiting", None)


@pytest.mark.parametrize(
    "file", ["../status.json", "../../../../secret.txt", "out.png", "pipe.png", "text.png", "", "a/b.png"]
)
def test_figures_are_pictures_in_their_folder(room, tmp_path, file):
    figures = room / "two" / "figures"
    (tmp_path / "outside.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (figures / "out.png").symlink_to(tmp_path / "outside.png")
    os.mkfifo(figures / "pipe.png")
    (figures / "text.png").write_text(EVIL)
    assert client(room).get("/api/figure", params={"name": "two", "file": file}).status_code == 404


def test_a_token_where_there_is_one(room):
    asked = client(room, "right", is_local=False, host="cluster:8421")
    for path in ("/", "/app.js", "/api/runs", "/api/events", "/?token=wrong", "/api/runs?token=right"):
        assert asked.get(path).status_code == 401, path
    assert asked.get("/api/runs", headers={"authorization": "Bearer wrong"}).status_code == 401
    assert asked.get("/api/runs", headers={"authorization": "Bearer right"}).status_code == 200
    answer = asked.get("/?token=right")
    assert answer.status_code == 303 and answer.headers["location"] == "/"
    assert re.search(r"HttpOnly; .*SameSite=strict", answer.headers["set-cookie"])
    assert asked.get("/api/runs").status_code == 200, "by the cookie, which a script cannot read"


def test_only_names_of_this_machine(room):
    # A page elsewhere can make a name of its own lead to 127.0.0.1; the browser then says that name.
    assert client(room, host="evil.example:8421").get("/api/runs").status_code == 421
    for host in ("localhost:8421", "127.0.0.1", "[::1]:8421"):
        assert client(room, host=host).get("/api/runs").status_code == 200


def test_what_changes_something_is_asked_by_the_page_alone(room, monkeypatch):
    monkeypatch.setattr(Queue, "wake", lambda self: None)  # a job that no runner starts
    queue = Queue(room)
    job = queue.add({"program": ["x.py"], "ranks": 1, "on": "slurm", "slurm": ""})
    with queue.locked():
        queue.change(job, on="here")
    asked = client(room)
    key = asked.get("/api/runs").json()["key"]
    refused = [
        {},
        {"x-xbraid-key": "wrong"},
        {"x-xbraid-key": key, "origin": "http://evil.example"},
        {"x-xbraid-key": key, "origin": "null"},
        {"x-xbraid-key": key, "origin": "http://127.0.0.1:9999"},
    ]
    for headers in refused:
        for path in ("/api/stop", "/api/resume"):
            assert asked.post(path, json={"job": 1}, headers=headers).status_code == 403, headers
    assert asked.get("/api/stop").status_code == 405
    own = {"x-xbraid-key": key, "origin": "http://127.0.0.1:8421"}
    assert queue.job(1).state == "waiting"
    answer = asked.post("/api/stop", json={"job": 1}, headers=own)
    assert answer.status_code == 200 and queue.job(1).state == "stopped", answer.text
    for body in ({"job": 99}, {"name": "../secret.txt"}, {"name": "two", "ranks": 0}, {}, []):
        path = "/api/resume" if "ranks" in body else "/api/stop"
        answer = asked.post(path, json=body, headers=own)
        assert answer.status_code == 400 and answer.json()["error"], body
    assert asked.post("/api/stop", content=b"{", headers=own).status_code == 400


def test_events_tell_what_is_new(room):
    folder = room / "two"
    with server(room) as address:
        stream = urllib.request.urlopen(f"{address}api/events?name=two&name=../secret.txt", timeout=60)
        assert stream.headers["content-type"].startswith("text/event-stream")

        def said(kind: str) -> dict:
            while True:
                line = stream.readline().decode().rstrip()
                if line == f"event: {kind}":
                    return json.loads(stream.readline().decode().removeprefix("data: "))

        assert len(said("runs")["runs"]) == 2
        first = said("rows")
        assert (first["name"], first["again"], len(first["rows"])) == ("two", True, 12)
        assert first["rows"][-1]["stacks.1.gradient_error"] == pytest.approx(0.12)
        with (folder / "metrics.jsonl").open("a") as record:
            record.write(json.dumps({"kind": "update", "update": 13, "loss": 0.2}) + "\n")
        more = said("rows")
        assert not more["again"] and more["rows"] == [{"run": "", "update": 13.0, "loss": 0.2}]
        (folder / "metrics.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in [{"kind": "header"}, *nested_rows(3)])
        )
        anew = said("rows")
        assert anew["again"] and [row["update"] for row in anew["rows"]] == [0, 1, 2]
        # A run that is waited for: a job that has not begun has no folder.
        later = urllib.request.urlopen(f"{address}api/events?name=later", timeout=60)
        make_run(room / "later", nested_rows(2))
        while not later.readline().startswith(b"event: rows"):
            pass
        assert len(json.loads(later.readline().removeprefix(b"data: "))["rows"]) == 2
        (folder / "status.json").write_text(json.dumps(status("finished")))
        states = {}
        while (states.get("two"), states.get("later")) != ("finished", "running"):
            states = {run["name"]: run["state"] for run in said("runs")["runs"]}


def test_it_asks_for_a_token_where_others_can_reach_it(room):
    with server(room, "--host=0.0.0.0", XBRAID_TOKEN="") as address:
        port, token = re.fullmatch(r"http://0\.0\.0\.0:(\d+)/\?token=([\w-]{32})", address).groups()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/runs", timeout=30)
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/runs", headers={"authorization": f"Bearer {token}"}
        )
        assert json.load(urllib.request.urlopen(request, timeout=30))["runs"]


def test_the_hierarchy_is_that_of_the_log_shown_last():
    table = "level  points  intervals  cfactor  ranks        step    work"
    fine = "    0      33          8        4      2      0.1562   66.7%"
    coarse = "    1       9          8        -      2       0.625   33.3%"
    log = [
        table,
        "    0      17         16        -      2      0.3125  100.0%",
        "2026 next",
        table,
        fine,
        coarse,
        "a line",
        fine,
    ]
    levels = hierarchy("\n".join(log))
    found = [(level["level"], level["intervals"], level["ranks"]) for level in levels]
    assert found == [("0", "8", "2"), ("1", "8", "2")]
    assert hierarchy("nothing of it") == []


@pytest.mark.parametrize(
    ("words", "message"),
    [(["nowhere"], "DIR=nowhere is no folder"), ([".", "--port=99999"], "port=99999 must be from 0 to 65535")],
)
def test_messages(words, message, capsys):
    assert main(["serve", *words]) == 2
    assert message in capsys.readouterr().err
