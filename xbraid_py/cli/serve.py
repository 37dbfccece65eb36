"""`xbraid-py serve`: runs, curves and the queue of a folder in a browser, live; runs can be stopped and continued.

It listens on this machine alone, unless it is told otherwise, and then asks for a token. Nothing outside the folder is
handed out, whatever a name or a link in it says; what files say reaches the page as JSON and is shown as text.
"""

from __future__ import annotations

import hmac
import json
import os
import re
import secrets
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from xbraid_py.cli import control
from xbraid_py.cli.queue import Queue
from xbraid_py.cli.reader import (
    CHECKPOINTS,
    CONFIGURATION,
    FIGURES,
    LOG,
    RECORD,
    STATUS,
    NoRun,
    Run,
    RunReader,
    command_parser,
    printable,
)
from xbraid_py.cli.status import STUDIES, study, summarize
from xbraid_py.run.documents import read_regular, tail
from xbraid_py.run.options import flat, text
from xbraid_py.run.record import number, scalars

try:
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError as error:
    raise ValueError("serve needs starlette and uvicorn; use pip install 'xbraid_py[serve]'") from error

PAGE = Path(__file__).with_name("page")
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_COOKIE, _KEY, _VARIABLE = "xbraid_token", "x-xbraid-key", "XBRAID_TOKEN"
_EVERY = 1.0  # seconds between two looks
# Of a run, at most: rows that are sent, columns of each, options, runs that are followed at once, bytes of a picture.
_ROWS, _COLUMNS, _OPTIONS, _RUNS, _FIGURE_BYTES, _LOG_BYTES = 4000, 60, 400, 50, 5_000_000, 60_000
_PNG = b"\x89PNG\r\n\x1a\n"
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def main(words: Sequence[str]) -> int:
    """Serve until it is interrupted."""
    import uvicorn

    epilog = (
        f"On another --host a token is asked for: the one in the variable {_VARIABLE}, or a new one, which is part of "
        f"the address that is printed. With {_VARIABLE} set it is asked for on this machine too."
    )
    parser = command_parser("serve", "[DIR] [--port N] [--host ADDRESS]", "Runs in a browser.", epilog)
    parser.add_argument("DIR", nargs="?", type=Path, default=Path("runs"), help="Folder of runs (%(default)s).")
    parser.add_argument("--port", type=int, default=8421, help="Port; 0 takes a free one (%(default)s).")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on (%(default)s).")
    options = parser.parse_args(words)
    if not 0 <= options.port < 65536:
        raise ValueError(f"port={options.port} must be from 0 to 65535; use --port=8421")
    if not options.DIR.is_dir():
        raise ValueError(f"DIR={options.DIR} is no folder; give one that holds runs, such as runs")
    token = os.environ.get(_VARIABLE) or (None if options.host in _LOOPBACK else secrets.token_urlsafe(24))
    app = make_app(options.DIR, token, options.host in _LOOPBACK)
    config = uvicorn.Config(
        app, host=options.host, port=options.port, log_level="warning", timeout_graceful_shutdown=5, access_log=False
    )
    sock = config.bind_socket()
    sock.listen()  # who opens the address at once is kept waiting, and not refused
    address = f"[{options.host}]" if ":" in options.host else options.host
    url = f"http://{address}:{sock.getsockname()[1]}/" + (f"?token={token}" if token else "")
    print(f"{printable(options.DIR)} is at {url}\nCtrl-C ends it", flush=True)
    serving = uvicorn.Server(config)
    app.state.is_ending = lambda: serving.should_exit
    serving.run(sockets=[sock])
    return 0


def make_app(folder: str | os.PathLike, token: str | None = None, is_local: bool = True) -> Starlette:
    """The application.

    Parameters
    ----------
    folder : path-like
        All that is handed out is in it.
    token : str, optional
        What a browser has to know.
    is_local : bool
        Only requests to a name of this machine are answered, so that no page elsewhere can have a name of its own
        lead here.
    """
    room = _Room(Path(folder))
    routes = [
        Route("/", _file("index.html")),
        Route("/app.js", _file("app.js")),
        Route("/chart.js", _file("chart.js")),
        Route("/style.css", _file("style.css")),
        Route("/api/runs", room.runs),
        Route("/api/run", room.run),
        Route("/api/events", room.events),
        Route("/api/figure", room.figure),
        Route("/api/log", room.log),
        Route("/api/stop", room.stop, methods=["POST"]),
        Route("/api/resume", room.resume, methods=["POST"]),
    ]
    app = Starlette(routes=routes)
    app.state.is_ending = lambda: False  # then streams end, which are waited for
    app.add_middleware(_Guard, token=token, is_local=is_local, key=room.key)
    return app


class _Guard:
    """Lets through who may ask, and says to the browser what the page may do."""

    def __init__(self, app, token: str | None, is_local: bool, key: str):
        self._app, self._token, self._is_local, self._key = app, token, is_local, key

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def answer(message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    *((name.encode(), value.encode()) for name, value in _HEADERS.items()),
                ]
            await send(message)

        request = Request(scope)
        await (self._refusal(request) or self._app)(scope, receive, answer)

    def _refusal(self, request: Request) -> Response | None:
        host = urlsplit(f"//{request.headers.get('host', '')}")
        if self._is_local and host.hostname not in _LOOPBACK:
            return PlainTextResponse("this server answers to names of this machine only", 421)
        if self._token is not None:
            if request.url.path == "/" and _same(request.query_params.get("token"), self._token):
                response = RedirectResponse("/", 303)
                response.set_cookie(_COOKIE, self._token, httponly=True, samesite="strict")
                return response
            bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not (_same(request.cookies.get(_COOKIE), self._token) or _same(bearer, self._token)):
                return PlainTextResponse("open the address that xbraid-py serve has printed, with its token", 401)
        if request.method not in ("GET", "HEAD"):
            origin = request.headers.get("origin")
            if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
                return PlainTextResponse("a page of another origin may not change anything here", 403)
            if not _same(request.headers.get(_KEY), self._key):
                return PlainTextResponse(f"the header {_KEY} must be what /api/runs says", 403)
        return None


def _same(given: str | None, known: str) -> bool:
    """Whether two words are the same, in a time that does not tell how much of them is."""
    return hmac.compare_digest((given or "").encode(), known.encode())


def _file(name: str):
    async def respond(request: Request) -> Response:
        path = PAGE / name
        return Response(path.read_bytes(), media_type=_TYPES[path.suffix])

    return respond


class _Room:
    """The folder, and what is known of it."""

    def __init__(self, folder: Path):
        self.key = secrets.token_urlsafe(24)  # a page elsewhere cannot read it
        self._folder, self._root = folder, os.path.realpath(folder)
        self._queue = Queue(folder)
        self._lock = threading.Lock()
        self._list: tuple[float, dict[str, Any]] = (-1e9, {})

    # What a name may lead to.

    def _is_inside(self, path: str | os.PathLike) -> bool:
        real = os.path.realpath(path)
        return real == self._root or real.startswith(self._root.rstrip(os.sep) + os.sep)

    def _path(self, name: str | None) -> Path:
        """The folder of a run by its name in the list; `NoRun` for any other."""
        if not name or "\0" in name or os.path.isabs(name) or ".." in Path(name).parts:
            raise NoRun(f"there is no run {name!r} here")
        path = self._folder / name
        if not path.is_dir() or not self._is_all_inside(path):
            raise NoRun(f"there is no run {name!r} here")
        return path

    def _is_all_inside(self, path: Path) -> bool:
        names = ("", STATUS, RECORD, CONFIGURATION, LOG, FIGURES, CHECKPOINTS, "lock")
        return all(self._is_inside(path / each) for each in names)

    # What is there.

    def _listed(self) -> dict[str, Any]:
        with self._lock:  # one look serves all browsers
            made, found = self._list
            if time.monotonic() - made > _EVERY:
                found = {
                    "folder": printable(self._folder),
                    "at_once": self._queue.at_once(),
                    "runs": [line for each in control.entries(self._folder) if (line := self._line(each))],
                    "studies": [
                        {"name": os.path.relpath(path.parent, self._folder), "says": ": ".join(study(path.parent))}
                        for path in sorted(self._folder.rglob(STUDIES))
                        if self._is_inside(path)
                    ],
                }
                self._list = time.monotonic(), found
            return found

    def _line(self, each: control.Entry) -> dict[str, Any] | None:
        """A run or job; of one outside the folder only what the queue says, None where that is nothing."""
        job, is_here = each.job, self._is_all_inside(each.path)
        if is_here:
            state, summary, message = each.state, each.summary, each.message
        elif job is not None:
            state, summary, message = job.state, None, job.message
        else:
            return None
        is_over = state in control.ENDED
        return {
            "name": each.name,
            "state": state,
            "job": job.number if job else None,
            "on": (f"slurm {job.slurm}" if job.on == "slurm" else "here") if job else None,
            "ranks": job.ranks if job else summary.ranks if summary else None,
            "update": summary.update if summary else None,
            "total": summary.total if summary else None,
            "accuracy": summary.accuracy if summary else None,
            "objective": summary.objective if summary else None,
            "seconds_left": summary.seconds_left if summary and not is_over else None,
            "message": printable(message),
            "can_stop": not is_over and state != "stopping" and (job is not None or state != "stale"),
            "can_resume": (is_over or (job is None and state == "stale")) and state != "finished",
            "is_here": summary is not None,
        }

    async def runs(self, request: Request) -> Response:
        """All runs and jobs."""
        return JSONResponse(await run_in_threadpool(self._listed) | {"key": self.key})

    async def run(self, request: Request) -> Response:
        """What does not change with every update of a run."""
        return await self._answer(request, self._about)

    def _about(self, path: Path) -> Response:
        run = RunReader(path).read()
        options = {str(name): text(value) for name, value in list(flat(run.configuration).items())[:_OPTIONS]}
        about = {name: value for name, value in flat(run.about).items() if name.startswith(("versions.", "host."))}
        values = {
            "name": os.path.relpath(path, self._folder),
            "driver": str(run.about.get("driver") or ""),
            "started": str(run.status.get("started") or run.header.get("date") or ""),
            "host": summarize(run).host,
            "options": options,
            "about": {str(name): text(value) for name, value in about.items() if value is not None},
            "hierarchy": hierarchy(_log_of(path)),
            "figures": [each.name for each in run.figures],
            "checkpoints": [each.name for each in run.checkpoints],
            "flaws": run.flaws,
            "log": _log_of(path),
        }
        return JSONResponse(values)

    async def figure(self, request: Request) -> Response:
        """A picture of a run."""
        name = request.query_params.get("file", "")

        def read(path: Path) -> Response:
            if not re.fullmatch(r"[^/\0]+\.png", name):
                raise NoRun("there is no such picture")
            content = read_regular(path / FIGURES / name, _FIGURE_BYTES, follow=False)
            if not content.startswith(_PNG):
                raise NoRun("this is no picture")
            return Response(content, media_type="image/png")

        return await self._answer(request, read)

    async def log(self, request: Request) -> Response:
        """The end of the log."""
        return await self._answer(request, lambda path: PlainTextResponse(_log_of(path)))

    async def _answer(self, request: Request, make) -> Response:
        try:
            path = self._path(request.query_params.get("name"))
            return await run_in_threadpool(make, path)
        except (NoRun, OSError) as error:
            return PlainTextResponse(printable(error) if isinstance(error, NoRun) else "not to be had", 404)

    # What goes on.

    async def events(self, request: Request) -> Response:
        """Server-sent events: "runs", the list whenever it has changed, and "rows", what is new in the runs named."""
        names = list(dict.fromkeys(request.query_params.getlist("name")))[:_RUNS]
        return StreamingResponse(self._stream(request, names), media_type="text/event-stream")

    async def _stream(self, request: Request, names: Sequence[str]) -> AsyncIterator[str]:
        import anyio

        before, followed = None, {}
        while not (request.app.state.is_ending() or await request.is_disconnected()):
            found = await run_in_threadpool(self._listed)
            if found != before:
                yield _event("runs", found)
                before = found
            for name in names:
                for said in await run_in_threadpool(self._news, name, followed):
                    yield _event("rows", said)
            yield ": still here\n\n"
            await anyio.sleep(_EVERY)

    def _news(self, name: str, followed: dict[str, _Followed]) -> list[dict[str, Any]]:
        """What is new in a run, which may not be there yet, or be gone."""
        try:
            path = self._path(name)  # each time: links may come meanwhile
        except NoRun:
            return []
        return list(followed.setdefault(name, _Followed(name, path)).news())

    # What is asked for.

    async def stop(self, request: Request) -> Response:
        """Ask a run for a checkpoint and its end."""
        return await self._act(request, lambda target, body: control.stop(self._queue, target, body.get("now") is True))

    async def resume(self, request: Request) -> Response:
        """Have a run go on, on as many ranks as before or on others."""

        def act(target: int | Path, body: dict[str, Any]) -> str:
            ranks = body.get("ranks")
            if ranks is not None and (type(ranks) is not int or not 1 <= ranks <= 100_000):
                raise ValueError(f"ranks={ranks!r} must be a number from 1 to 100000; use 4")
            job = control.resume(self._queue, target, ranks)
            return f"job {job.number} goes on, on {job.ranks} ranks"

        return await self._act(request, act)

    async def _act(self, request: Request, act) -> Response:
        try:
            body = json.loads(await request.body())
            if not isinstance(body, dict):
                raise ValueError("the body must be an object")
            job = body.get("job")
            target = job if type(job) is int else self._path(body.get("name"))
            said = await run_in_threadpool(act, target, body)
        except (ValueError, OSError) as error:
            return JSONResponse({"error": printable(error)}, 400)
        with self._lock:
            self._list = (-1e9, {})
        return JSONResponse({"said": printable(said)})


class _Followed:
    """A run whose rows are sent as they come."""

    def __init__(self, name: str, path: Path):
        self._name, self._reader, self._sent = name, RunReader(path), 0
        self._rows: list[dict[str, Any]] | None = None

    def news(self) -> Iterator[dict[str, Any]]:
        """What is new, if anything is; all of it, with "again", when the record has begun anew."""
        try:
            run: Run = self._reader.read()
        except (NoRun, OSError):
            return
        again = run.rows is not self._rows or len(run.rows) < self._sent  # a new list is another record
        rows = run.rows if again else run.rows[self._sent :]
        self._rows, self._sent = run.rows, len(run.rows)
        if rows or again:
            step = max(1, -(-len(rows) // _ROWS))
            kept = [row for at, row in enumerate(rows) if at % step == 0 or at >= len(rows) - 1 or _is_validated(row)]
            yield {"name": self._name, "again": again, "rows": [_sent(row) for row in kept]}


def _is_validated(row: dict[str, Any]) -> bool:
    return row.get("val_accuracy") is not None or row.get("val_loss") is not None


def _sent(row: dict[str, Any]) -> dict[str, Any]:
    values = dict(list(scalars(row).items())[:_COLUMNS])
    return {"run": printable(row.get("run") or ""), "update": number(row.get("update")), **values}


def _event(kind: str, value: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps(value)}\n\n"


def _log_of(path: Path) -> str:
    try:
        return "\n".join(map(printable, tail(path / LOG, _LOG_BYTES).decode(errors="replace").splitlines()))
    except OSError:
        return ""


_TITLES = ("level", "points", "intervals", "cfactor", "ranks", "step", "work")


def hierarchy(log: str) -> list[dict[str, str]]:
    """The levels of the solver that a log shows last, each with its points, intervals and ranks."""
    found: list[dict[str, str]] = []
    is_inside = False
    for line in log.splitlines():
        words = line.split()
        if tuple(words) == _TITLES:
            found, is_inside = [], True
        elif is_inside and len(words) == len(_TITLES) and words[0].isdecimal():
            found.append(dict(zip(_TITLES, words, strict=True)))
        else:
            is_inside = False
    return found
