"""A short run to serve, a service on loopback in this process, and requests to it by the standard library."""

from __future__ import annotations

import atexit
import functools
import http.client
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from varlora.config import settings_from
from varlora.demo.base import BUNDLED
from varlora.demo.run import one_thread
from varlora.loading import Loaded, load
from varlora.prompt import Encoded
from varlora.serve import Limits, Service, make_service
from varlora.serve.base import Drawn, Use
from varlora.serve.process import Server, listen
from varlora.training import train

USE = Use(calibrated=False, tau=1.0, samples=2)


def silent(text: str) -> None:
    pass


@functools.cache
def trained(task: str = "four_choices", dtype: str = "float32") -> Path:
    """Return a run of ten steps on one of the demo's tasks; no test changes it."""
    folder = Path(tempfile.mkdtemp(prefix="varlora-serve-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    settings = {"task": str(BUNDLED / "tasks" / f"{task}.yaml"), "model": str(BUNDLED / "base"), "dtype": dtype}
    with one_thread():
        train(settings_from({**settings, "steps": 10, "run_dir": str(folder / "run")}), say=silent)
    return folder / "run"


@functools.cache
def loaded(task: str = "four_choices") -> Loaded:
    return load(trained(task))


@functools.cache
def task_rows(task: str = "four_choices") -> list[dict[str, Any]]:
    """Return the rows of the evaluation split as they stand in the file."""
    return [json.loads(line) for line in (BUNDLED / "tasks" / f"{task}.dev.jsonl").read_text().splitlines()]


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return self.json["error"]["code"]


@dataclass
class Live:
    """A service that listens."""

    port: int
    service: Service
    said: list[str] = field(default_factory=list)

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named, encode_chunked=named.get("transfer-encoding") == "chunked")
        response = connection.getresponse()
        reply = Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        connection.close()
        return reply

    def get(self, path: str, **headers: str) -> Reply:
        return self.send("GET", path, **headers)

    def ask(self, **body: Any) -> Reply:
        return self.post(json.dumps(body))

    def post(self, body: Any, **headers: str) -> Reply:
        return self.send("POST", "/v1/answer", body, **{"content_type": "application/json", **headers})

    def metric(self, name: str, **labels: str) -> float | None:
        return self.service.counters.registry.get_sample_value(f"varlora_serve_{name}", labels)


@contextmanager
def live(run_dir: Path | None = None, run: Loaded | None = None, **settings: Any) -> Iterator[Live]:
    """Within the context a run is served on loopback."""
    run_dir, said = run_dir or trained(), []
    service = make_service(run or loaded(), run_dir, say=said.append, **settings)
    with serving(service, said) as found:
        yield found
    service.close()


@contextmanager
def serving(service: Service, said: list[str]) -> Iterator[Live]:
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        engine = service.engine
        server = Server(service.app, stop=engine.stop, busy=lambda: engine.alive, connections=Limits().connections)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        try:
            yield Live(port, service, said)
        finally:
            server.should_exit = True
            thread.join(timeout=30)
            assert not thread.is_alive()


def until(true: Callable[[], Any], seconds: float = 30.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


class Held:
    """A way to draw that begins when it is let, and notes its batches."""

    def __init__(self, draw: Callable[[Sequence[Encoded], Use], torch.Tensor]) -> None:
        self.draw, self.go, self.begun, self.batches = draw, threading.Event(), threading.Event(), []

    def __call__(self, rows: Sequence[Encoded], use: Use) -> torch.Tensor:
        self.batches.append([row.id for row in rows])
        self.begun.set()
        assert self.go.wait(timeout=60)
        return self.draw(rows, use)


def numbered(rows: Sequence[Encoded], use: Use) -> torch.Tensor:
    """Logits of two draws that are a row's own: those of row 3 say so."""
    classes = max(len(row.label_tokens) for row in rows)
    logits = torch.full((2, len(rows), classes), -torch.inf)
    for i, row in enumerate(rows):
        count = len(row.label_tokens)
        logits[0, i, :count] = torch.arange(count) * (float(row.id) % 97) / 97 * use.tau
        logits[1, i, :count] = 0.0
    return logits


def row_of(id: int, length: int = 4, answers: int = 2) -> Encoded:
    return Encoded(str(id), tuple(range(length)), tuple(range(answers)), None, False)


def submitted(engine: Any, rows: Sequence[Encoded], use: Use = USE) -> list[Future[Drawn]]:
    with engine.reserved(len(rows)) as slots:
        return slots.submit(rows, use)
