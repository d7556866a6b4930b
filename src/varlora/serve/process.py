"""The process: a socket, uvicorn on it, how long it waits for clients, and what a signal does.

At the first SIGTERM or SIGINT new requests are refused with 503 while those that were taken are finished; then the
sockets close and the process ends with status 0. At the second it ends at once. uvicorn's own handling raises the
signal again when all is done, so that the status would be the signal's.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from varlora.errors import VarloraError
from varlora.serve.base import CROWDED

__all__ = ["Server", "listen"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 10
"""Seconds in which clients have to read what was answered, once the service stops."""
KEEP_ALIVE = 30
"""Seconds after an answer in which the next request has to begin."""
HEAD = 60
"""Seconds in which the head of a request has to come, and a part of an answer to be read; more than `KEEP_ALIVE`."""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Args:
        host: name or address of this machine.
        port: 0: any that is free.

    Raises:
        VarloraError: the address is no address of this machine, or is taken.

    Example:
        >>> with listen("127.0.0.1", 0) as found:
        ...     found.getsockname()[0]
        '127.0.0.1'
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError, UnicodeError) as error:  # a name such as `a..b` cannot be encoded
        why = getattr(error, "strerror", None) or error
        raise VarloraError(
            f"Expected `host` and `port` to be free on this machine, but {host}:{port} cannot be listened at ({why}). "
            "Give another `--port`, 0 for any."
        ) from error


class Impatient(H11Protocol):
    """uvicorn's own waits forever for a first request, for the rest of a head, and for clients that read nothing.

    Here a connection is cut some seconds after it was made, or an answer given, unless a request is being answered or
    the client goes on reading. That bodies come in time is the application's part; answers are in one piece.

    Args:
        args: see uvicorn.
        seconds: how many; more than an idle connection is kept.
        more: see uvicorn.
    """

    def __init__(self, *args: Any, seconds: float, **more: Any) -> None:
        super().__init__(*args, **more)
        self._seconds = seconds

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect the first request."""
        super().connection_made(transport)
        self._wait()

    def on_response_complete(self) -> None:
        """Expect that the answer is read, and the next request."""
        self._late.cancel()
        self._wait()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing more."""
        self._late.cancel()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._unread = self.transport.get_write_buffer_size()
        self._late = self.loop.call_later(self._seconds, self._look)

    def _look(self) -> None:
        unread = self.transport.get_write_buffer_size()
        answering = self.cycle is not None and not self.cycle.response_complete
        if unread < self._unread:
            self._wait()
        elif unread or not answering:
            self.transport.abort()


class Server(uvicorn.Server):
    """uvicorn, with a stop that finishes what was taken.

    Args:
        app: the application.
        stop: called at the first signal: take no new requests.
        busy: whether what was taken is not done yet.
        connections: so many may be open; of more, idle ones too, the application is told by `CROWDED` in the scope.
        patience: seconds in which the answers have to be read, once all is done; then connections are cut.
        head: seconds in which the head of a request has to come, and a part of an answer to be read.
    """

    def __init__(
        self,
        app: Any,
        *,
        stop: Callable[[], None],
        busy: Callable[[], bool],
        connections: int,
        patience: int = PATIENCE,
        head: float = HEAD,
    ) -> None:
        async def told(scope: Any, receive: Any, send: Any) -> None:
            await app({**scope, CROWDED: len(self.server_state.connections) > connections}, receive, send)

        config = uvicorn.Config(
            told,
            http=partial(Impatient, seconds=head),  # type: ignore[arg-type]
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=patience,
        )
        super().__init__(config)
        self.stop, self.busy = stop, busy
        self.signals = 0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Within the context signals stop the server, if this is the main thread."""
        loop = asyncio.get_running_loop()
        try:
            before = {number: signal.signal(number, lambda *_: self._signalled(loop)) for number in SIGNALS}
        except ValueError:  # another thread: who runs it there calls `finish`
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the sockets, wait for those who read, and cut off who does not."""
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def _signalled(self, loop: asyncio.AbstractEventLoop) -> None:
        self.signals += 1
        if self.signals > 1:
            self.should_exit = self.force_exit = True
        else:
            loop.call_soon_threadsafe(self.finish)

    def finish(self) -> None:
        """Take no new requests, answer those that were taken, and end; to be called in the server's loop."""
        self.stop()
        self._finishing = asyncio.ensure_future(self._finished())

    async def _finished(self) -> None:
        while self.busy():
            await asyncio.sleep(0.02)
        self.should_exit = True
