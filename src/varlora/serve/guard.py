"""What stands before every request: the Host header, a bound on connections, security headers, HEAD, counting.

An ASGI middleware, around the whole application; no traceback gets past it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from varlora.serve.base import CROWDED, MISTAKE, error_json, where

__all__ = ["CSP", "Guard"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Nothing inline, nothing from elsewhere, and no other page around this one."""
HEADERS = (
    (b"content-security-policy", CSP.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
    (b"cache-control", b"no-store"),
)
HEALTH = ("/healthz", "/readyz")
"""Answered however many connections are open: a full service is no dead one."""
CROWD = error_json("busy", "Too many connections are open. Try again later.")
SHED = ((b"retry-after", b"1"), (b"connection", b"close"))
"""Headers of its refusal."""
GONE = 499
"""Status under which a request is counted whose client did not wait for the answer."""


class Guard:
    """The middleware.

    Args:
        app: the application.
        paths: those that are counted by their name; all others are `other`.
        hosts: what the Host header may name, with any port; nothing: any. A page elsewhere whose name is made to point
            here (DNS rebinding) sends its own name.
        count: told path, status and seconds of each request.
        say: told of what should not happen, without anybody's text.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        *,
        paths: Sequence[str],
        hosts: Sequence[str],
        count: Callable[[str, int, float], None],
        say: Callable[[str], None],
    ) -> None:
        self.app, self.paths, self.count, self.say = app, frozenset(paths), count, say
        self.hosts = frozenset(map(_name, hosts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 0
        is_head = scope["method"] == "HEAD"
        asked = {**scope, "method": "GET"} if is_head else scope  # FastAPI's routes of GET do not take HEAD

        async def guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {name for name, _ in message.get("headers", ())}
                more = [(name, value) for name, value in HEADERS if name not in given]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        try:
            if not self._is_welcome(scope):
                await _answer(guarded, 400, error_json("host", "The Host header names no host of this service."))
            elif scope.get(CROWDED) and scope["path"] not in HEALTH:
                await _answer(guarded, 503, CROWD, SHED)
            else:
                await self.app(asked, receive, guarded)
        except Exception as error:
            self.say(f"A request failed: {where(error)}.")
            if not status:
                await _answer(guarded, 500, MISTAKE)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.count(path, status or GONE, time.perf_counter() - begun)

    def _is_welcome(self, scope: Scope) -> bool:
        if not self.hosts:
            return True
        given = [value for name, value in scope["headers"] if name == b"host"]
        return len(given) == 1 and _name(given[0].decode("latin-1")) in self.hosts


def _name(host: str) -> str:
    """Return a host without its port: `name`, `name:80`, `::1`, `[::1]` and `[::1]:80` are taken."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host if host.count(":") > 1 else host.partition(":")[0]


async def _answer(send: Send, status: int, body: dict[str, Any], more: Sequence[tuple[bytes, bytes]] = ()) -> None:
    text = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})
