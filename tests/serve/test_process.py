"""The real process: it starts, says where, is stopped by signals under load, and ends with 0 when all is answered."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from serve_helpers import Held, Live, loaded, silent, task_rows, trained, until

from varlora.cli import main
from varlora.errors import VarloraError
from varlora.serve import _is_loopback, make_service, serve
from varlora.serve.process import Server, listen


@contextlib.contextmanager
def process(*options):
    """Run `varlora serve` on a free port; killed in the end, should it still run."""
    command = [sys.executable, "-m", "varlora.cli", "serve", str(trained()), "--port", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as found:
        try:
            found.port = int(found.stdout.readline().rpartition("http://127.0.0.1:")[2].partition("/")[0])
            yield found
        finally:
            found.kill()


def test_sigterm_under_load_finishes_what_was_taken(tmp_path):
    rows, statuses, broken, stopped = task_rows()[:8], [], [], threading.Event()

    def ask():
        """Ask one question after the other, each on its own connection, until nobody listens."""
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", found.port, timeout=60)
            try:
                connection.request(
                    "POST", "/v1/answer", json.dumps({"rows": rows}), {"content-type": "application/json"}
                )
                response = connection.getresponse()
                body = json.loads(response.read())
                assert response.status != 200 or [one["id"] for one in body["results"]] == [row["id"] for row in rows]
                statuses.append(response.status)
            except (OSError, http.client.HTTPException) as error:
                broken.append((stopped.is_set(), error))
                return
            finally:
                connection.close()

    with process("--samples", "3") as found:
        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        until(lambda: len(statuses) >= 6)
        stopped.set()
        found.send_signal(signal.SIGTERM)
        out, err = found.communicate(timeout=60)
        for thread in threads:
            thread.join()
    assert found.returncode == 0
    assert all(after for after, _ in broken), broken
    assert set(statuses) <= {200, 503}
    assert out.splitlines()[-1] == f"Stopped: {statuses.count(200)} requests were answered."
    assert "Traceback" not in err
    assert rows[0]["question"] not in out + err


def told_to_end_twice(service, begun):
    """Ask what takes long, send SIGINT and then SIGTERM, and see that the first alone does not end it."""
    assert service.get("/readyz").json == {"status": "ready"}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(service.ask, rows=task_rows()[:64])
        until(lambda: begun(service))
        yield signal.SIGINT
        until(lambda: service.get("/readyz").json == {"status": "stopping"})
        yield signal.SIGTERM
        with pytest.raises((OSError, http.client.HTTPException)):
            asked.result(timeout=30)


def test_a_second_signal_ends_it_at_once(monkeypatch):
    held, said, made = Held(lambda rows, use: torch.zeros(1, len(rows), 4)), [], []

    def held_up(*given, **settings):
        made.append(make_service(*given, **settings))
        made[0].engine.draw = held
        return made[0]

    def ended(status):
        raise SystemExit(status)

    def signals():
        until(lambda: said)
        service = Live(int(said[-1].rpartition("http://127.0.0.1:")[2].partition("/")[0]), made[0])
        for number in told_to_end_twice(service, lambda service: held.begun.is_set()):
            os.kill(os.getpid(), number)

    monkeypatch.setattr("varlora.serve.make_service", held_up)
    monkeypatch.setattr(os, "_exit", ended)
    with ThreadPoolExecutor(1) as pool:
        client = pool.submit(signals)
        with pytest.raises(SystemExit) as exit:
            serve(trained(), port=0, say=said.append)
        client.result(timeout=30)
    assert exit.value.code == 130
    assert said[-1] == "Ended at once: what was taken is not answered."
    held.go.set()
    made[0].close()


@pytest.mark.slow
def test_a_second_signal_ends_the_process_within_a_pass():
    with process("--samples", "200") as found:
        rows_wait = lambda service: b"queue_rows 0.0" not in service.get("/metrics").body  # noqa: E731
        for number in told_to_end_twice(Live(found.port, None), rows_wait):
            assert found.poll() is None
            found.send_signal(number)
        out, _ = found.communicate(timeout=30)
    assert found.returncode == 130
    assert out.endswith("Ended at once: what was taken is not answered.\n")


MUCH = 20_000_000
"""Bytes: more than sockets hold."""


@pytest.fixture
def serving():
    """Run servers of three things, each in a loop of its own."""

    async def three(scope, receive, send):
        if scope["path"] == "/slow":
            await asyncio.sleep(1.5)
        body = b"x" * (MUCH if scope["path"] == "/much" else 2)
        length = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": body})

    def started(app=three, **settings):
        sock = stack.enter_context(listen("127.0.0.1", 0))
        found = Server(app, stop=lambda: None, busy=lambda: False, **{"connections": 3, "patience": 1, **settings})
        found.port, found.loop = sock.getsockname()[1], asyncio.new_event_loop()
        thread = threading.Thread(target=lambda: found.loop.run_until_complete(found.serve(sockets=[sock])))
        thread.start()
        stack.callback(ended, found, thread)
        until(lambda: found.started)
        return found

    def ended(found, thread):
        found.loop.call_soon_threadsafe(found.finish)
        thread.join(timeout=20)
        assert not thread.is_alive()
        found.loop.close()

    with contextlib.ExitStack() as stack:
        yield started


@pytest.fixture
def server(serving):
    return serving()


def connected(server, *sent):
    client = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    client.sendall(b"".join(b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path.encode() for path in sent))
    return client


def test_a_client_that_does_not_read_is_cut_off_when_the_service_stops(server):
    with connected(server, "/much") as lazy:
        until(lambda: server.server_state.tasks)
        server.loop.call_soon_threadsafe(server.finish)
        until(lambda: not server.loop.is_running(), seconds=15)
        read = 0
        while chunk := lazy.recv(1 << 20):
            read += len(chunk)
        assert read < MUCH


def test_beyond_the_limit_of_connections_all_but_the_health_is_refused(serving):
    service = make_service(loaded(), trained(), say=silent)
    server = serving(app=service.app, connections=2)
    live, connections = Live(server.port, service), server.server_state.connections
    with connected(server), connected(server) as idle:
        until(lambda: len(connections) == 2)
        refused = live.get("/v1/run")
        assert (refused.status, refused.code) == (503, "busy")
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["connection"] == "close"
        assert refused.headers["x-content-type-options"] == "nosniff"
        assert live.send("HEAD", "/v1/run").status == live.ask(question="q", answers=["a", "b"]).status == 503
        assert live.get("/healthz").status == live.get("/readyz").status == 200
        assert live.metric("requests_total", path="/v1/run", status="503") == 2
        idle.close()
        until(lambda: len(connections) == 1)
        assert live.get("/v1/run").status == 200
    service.close()


# --- clients that keep it waiting


def is_closed(client):
    try:
        return not client.recv(1000)
    except TimeoutError:
        return False
    except ConnectionError:
        return True


@pytest.mark.parametrize("before", [(), ("/",)])
@pytest.mark.parametrize(("begin", "drip"), [(b"", b""), (b"GET / HTTP/1.1\r\nHost: loc", b""), (b"GET /", b"x")])
def test_a_connection_on_which_no_head_comes_is_closed(serving, before, begin, drip):
    with connected(serving(head=0.5), *before) as client:
        if before:
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
        client.sendall(begin)
        client.settimeout(0.05)
        end = time.monotonic() + 10
        while not is_closed(client):
            assert time.monotonic() < end
            with contextlib.suppress(ConnectionError):
                client.sendall(drip)


@pytest.mark.parametrize("asked", [("/much",), ("/much", "/much")])
def test_a_client_that_reads_nothing_is_cut_off(serving, asked):
    server = serving(head=0.5)
    with connected(server, *asked):
        until(lambda: server.server_state.total_requests)
        until(lambda: not server.server_state.connections, seconds=10)


def test_a_client_that_reads_slowly_gets_all(serving):
    read = 0
    with connected(serving(head=1), "/much", "/much") as slow:
        while read < 2 * MUCH:
            chunk = slow.recv(1_000_000, socket.MSG_WAITALL)
            assert chunk
            read += len(chunk)
            time.sleep(0.06)


def test_requests_are_answered_however_slowly_and_one_after_the_other(serving):
    def answered(count):
        read = b""
        while read.count(b"\r\n\r\nxx") < count:
            chunk = client.recv(1000)
            assert chunk
            read += chunk

    with connected(serving(head=1), "/slow", "/", "/slow") as client:
        answered(3)
        for _ in range(4):
            time.sleep(0.4)
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answered(1)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.0.0.2", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("a.b", False)],
)
def test_what_the_loopback_is_called(host, loopback):
    assert _is_loopback(host) is loopback


def test_an_address_that_is_taken_is_said(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(trained()), "--port", str(port)]) == 1
    error = capsys.readouterr().err
    assert f"127.0.0.1:{port} cannot be listened at" in error
    assert "--port" in error


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"samples": -1}, "`samples`"),
        ({"tau": -1.0}, "`tau`"),
        ({"risk": 1.5}, "`risk`"),
        ({"port": 70_000}, "`port`"),
        ({"host": "no.such.host.example."}, "cannot be listened at"),
        ({"host": "a..b"}, "cannot be listened at"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_loaded(settings, reason):
    with pytest.raises(VarloraError, match=reason):
        serve(trained(), say=silent, **{"port": 0, **settings})


def test_what_is_no_run(tmp_path, capsys):
    assert main(["serve", str(tmp_path / "none"), "--port", "0"]) == 1
    assert "error: " in capsys.readouterr().err


def test_without_its_extra_it_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    with pytest.raises(VarloraError, match=r'needs uvicorn.*pip install "varlora\[serve\]"'):
        serve(trained(), port=0, say=silent)
