"""The HTTP side: routes, the reading of bodies within limits, and answers as JSON."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException
from fastapi.responses import JSONResponse, Response

from varlora import __version__
from varlora.serve.base import MISTAKE, Drawn, Limits, Refused, Use, error_json

__all__ = ["PATHS", "Parts", "make_app"]

PATHS = ("/", "/page.js", "/page.css", "/v1/answer", "/v1/run", "/healthz", "/readyz", "/metrics", "/openapi.json")
"""All that is there; every other path is 404."""
QUANTILES = (0.05, 0.95)
"""Between these lies the middle nine tenths of the draws."""
BIG = 2000
"""Probabilities, over all draws of a request's rows, from which on its response is made beside the event loop."""


@dataclass(frozen=True)
class Parts:
    """What the application is put together from."""

    engine: Any
    """Answers rows; see `varlora.serve.engine`."""
    asker: Any
    """Makes rows ready; see `varlora.serve.asking`."""
    tokenizing: Executor
    """Where that is done, in one thread."""
    parse: Callable[[bytes, Limits], Any]
    """Reads a request's body."""
    schema: dict[str, Any]
    """JSON schema of that body."""
    threshold: Callable[[float, Use], Any]
    """Makes of a risk the threshold of confidence; see `varlora.serve.abstain`."""
    counters: Any
    """Counts; see `varlora.serve.counters`."""
    limits: Limits
    default: Use
    """How rows are drawn that say nothing of it."""
    by_hand: Callable[[float], Use]
    """How rows are drawn whose request gives a factor of the variance."""
    risk: float | None
    """The risk of requests that give none; None: they are not told when to abstain."""
    about: dict[str, Any]
    """What `/v1/run` says."""
    files: dict[str, tuple[str, str]]
    """The page and what belongs to it: path -> media type and text."""


def make_app(parts: Parts) -> FastAPI:
    """Make the application; `varlora.serve.guard` belongs around it."""
    # the pages of docs_url and redoc_url load their scripts from elsewhere
    app = FastAPI(title="varlora", version=__version__, docs_url=None, redoc_url=None)
    reading = 0

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return _refusal(error)

    @app.exception_handler(HTTPException)
    @app.exception_handler(404)
    @app.exception_handler(405)
    async def not_there(request: Request, error: Any) -> Response:
        headers = dict(error.headers or {})
        return JSONResponse(error_json("not_found", str(error.detail)), error.status_code, headers)

    @app.exception_handler(Exception)
    async def mistaken(request: Request, error: Exception) -> Response:  # the guard says where
        return JSONResponse(MISTAKE, 500)

    @app.post("/v1/answer", openapi_extra=_body(parts.schema), summary="Answer questions.")
    async def answer(request: Request) -> Response:
        ask = await asked(request)
        use = parts.default if ask.tau is None else parts.by_hand(ask.tau)
        risk, with_draws = parts.risk if ask.risk is None else ask.risk, ask.draws
        loop = asyncio.get_running_loop()
        gone = asyncio.ensure_future(request.receive())  # the body is read: the next message is a disconnect
        try:
            with parts.engine.reserved(ask.count) as slots:
                ready = loop.run_in_executor(parts.tokenizing, parts.asker.ready, ask)
                if not await _done(ready, gone):
                    parts.counters.rows("dropped", ask.count)
                    return Response(status_code=499)  # nobody is there to read it
                rows = ready.result()
                futures = slots.submit([row.encoded for row in rows if not isinstance(row, Refused)], use)
            ids = [ask.id_of(i) if isinstance(row, Refused) else row.id for i, row in enumerate(rows)]
            del ask  # many may wait, and texts are larger than their tokens
            if futures and not await _done(_all(futures), gone):
                parts.engine.cancel(futures)
                return Response(status_code=499)
        finally:
            gone.cancel()
        waiting = iter(futures)
        outcomes = [row if isinstance(row, Refused) else _outcome(next(waiting)) for row in rows]

        def made() -> Response:
            threshold = None if risk is None else parts.threshold(risk, use)
            return _answered(ids, rows, outcomes, with_draws, use, threshold, parts.counters.abstained)

        size = sum(0 if isinstance(outcome, Refused) else outcome.draws.numel() for outcome in outcomes)
        return await loop.run_in_executor(None, made) if size > BIG else made()

    async def asked(request: Request) -> Any:
        nonlocal reading
        parts.engine.check_taking()
        if reading >= parts.limits.max_reading:
            raise Refused(503, "busy", f"{reading} requests are being read. Try again later.", 1)
        reading += 1
        try:
            body = await _body_of(request, parts.limits)
        finally:
            reading -= 1
        return parts.parse(body, parts.limits)

    @app.get("/v1/run", summary="What is served, and within which limits.")
    async def run() -> Response:
        return JSONResponse(parts.about)

    @app.get("/healthz", summary="Whether the engine lives.")
    async def healthz() -> Response:
        alive = parts.engine.alive
        return JSONResponse({"status": "ok" if alive else "dead"}, 200 if alive else 503)

    @app.get("/readyz", summary="Whether requests are taken.")
    async def readyz() -> Response:
        ready = parts.engine.alive and not parts.engine.stopping
        return JSONResponse({"status": "ready" if ready else "stopping"}, 200 if ready else 503)

    @app.get("/metrics", summary="Prometheus metrics.")
    async def metrics() -> Response:
        return Response(parts.counters.text(), headers={"content-type": parts.counters.content_type})

    def file(path: str, media_type: str, text: str) -> None:
        @app.get(path, include_in_schema=False)
        async def given() -> Response:
            return Response(text, media_type=media_type)

    for path, (media_type, text) in parts.files.items():
        file(path, media_type, text)
    return app


def _refusal(error: Refused) -> Response:
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if error.status in (408, 413) or error.code == "stopping":
        headers["connection"] = "close"
    return JSONResponse(error_json(error.code, str(error)), error.status, headers)


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


# --- reading


async def _body_of(request: Request, limits: Limits) -> bytes:
    """Read a body of JSON within the limits, whether or not its length is said beforehand."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page elsewhere can send other types without asking
        raise Refused(415, "content_type", "Expected a body of `Content-Type: application/json`.")
    too_large = Refused(413, "too_large", f"Expected a body of at most {limits.max_body} bytes, but it is longer.")
    length = request.headers.get("content-length", "")
    refused = length.isdecimal() and int(length) > limits.max_body
    if refused and request.headers.get("expect"):
        raise too_large  # the client waits for a word before it sends
    chunks: list[bytes] = []
    size, until = 0, time.monotonic() + limits.body_seconds
    while True:
        try:
            message = await asyncio.wait_for(request.receive(), until - time.monotonic())
        except asyncio.TimeoutError:
            if refused:
                raise too_large from None
            late = f"Expected the body within {limits.body_seconds:g} seconds, but it did not come."
            raise Refused(408, "slow", late) from None
        if message["type"] == "http.disconnect":
            raise Refused(499, "gone", "The client has gone.")
        chunk = message.get("body", b"")
        size += len(chunk)
        refused = refused or size > limits.max_body
        if refused:
            chunks.clear()  # some more is read, and forgotten, so that the client gets to read the answer
            if size > 8 * limits.max_body or not message.get("more_body"):
                raise too_large
        else:
            chunks.append(chunk)
        if not message.get("more_body"):
            return b"".join(chunks)


async def _done(work: asyncio.Future[Any], gone: asyncio.Future[Any]) -> bool:
    """Wait for work as long as the client is there, and cancel it else; return whether it is done."""
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        return work.done()
    finally:
        work.cancel()


def _all(futures: Sequence[Future[Drawn]]) -> asyncio.Future[Any]:
    rows: asyncio.Future[Any] = asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
    rows.add_done_callback(lambda done: done.cancelled() or done.exception())  # else asyncio logs that nobody asked
    return rows


# --- answering


def _outcome(future: Future[Drawn]) -> Drawn | Refused:
    error = future.exception()
    return error if isinstance(error, Refused) else future.result()


def _answered(
    ids: Sequence[str],
    rows: Sequence[Any],
    outcomes: Sequence[Drawn | Refused],
    with_draws: bool,
    use: Use,
    threshold: Any,
    abstained: Callable[[int], None],
) -> Response:
    refusals = [outcome for outcome in outcomes if isinstance(outcome, Refused)]
    if len(outcomes) == 1 and refusals:
        raise refusals[0]
    results, draws = [], 0
    for id, row, outcome in zip(ids, rows, outcomes):
        if isinstance(outcome, Refused):
            results.append({"id": id, **error_json(outcome.code, str(outcome))})
        else:
            results.append(_result(row, outcome, threshold, with_draws))
            draws = max(draws, len(outcome.draws))
    abstained(sum(bool(result.get("abstain")) for result in results))
    status = 200 if len(refusals) < len(outcomes) else max(refusal.status for refusal in refusals)
    found: dict[str, Any] = {"results": results, "calibrated": use.calibrated, "tau": use.tau}
    found["samples"] = draws if use.samples else 0
    if threshold is not None:
        found["risk"] = {"target": threshold.risk, "confidence": threshold.confidence, "held_out": threshold.rows}
    return JSONResponse(found, status)


def _result(row: Any, drawn: Drawn, threshold: Any, with_draws: bool) -> dict[str, Any]:
    probs = drawn.probs.tolist()
    low, high = torch.quantile(drawn.draws, torch.tensor(QUANTILES, dtype=drawn.draws.dtype), dim=0).tolist()
    std = drawn.draws.std(dim=0, correction=0).tolist()
    best = max(range(len(probs)), key=probs.__getitem__)
    found = {
        "id": row.id,
        "answer": row.answers[best],
        "probabilities": dict(zip(row.answers, probs)),
        "spread": {answer: {"low": a, "high": b, "std": s} for answer, a, b, s in zip(row.answers, low, high, std)},
        "uncertainty": drawn.uncertainty,
        "abstain": None if threshold is None else threshold.abstains(probs[best]),
        "cut": row.encoded.cut,
    }
    if with_draws:
        found["draws"] = dict(zip(row.answers, drawn.draws.T.tolist()))
    return found
