"""What the parts of the service share: its limits, how a row is to be drawn, what comes of it, and refusals."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from varlora.errors import VarloraError
from varlora.prompt import Encoded

__all__ = ["CROWDED", "MISTAKE", "Draw", "Drawn", "Limits", "Refused", "Use", "Watch", "error_json", "safe", "where"]

LONGEST_REASON = 600
"""Characters of a refusal's words, which may quote a row."""


@dataclass(frozen=True)
class Limits:
    """What the service takes at most.

    Example:
        >>> Limits(queue=8).max_rows
        8
    """

    queue: int = 256
    """Rows that wait; a request that does not fit is refused with 503."""
    batch_tokens: int = 4096
    """Tokens of a batch, padding included, for each draw; a longer row goes alone."""
    max_body: int = 256 * 1024
    """Bytes of a request's body."""
    max_rows: int = 64
    """Rows of a request; never more than the queue holds."""
    max_answers: int = 64
    """Answers of a question."""
    max_answer: int = 1000
    """Characters of an answer."""
    max_tau: float = 4.0
    """The largest factor of the variance that a request may ask for."""
    body_seconds: float = 10.0
    """Seconds in which a request's body has to arrive."""
    max_reading: int = 256
    """Requests whose bodies are read at a time."""

    def __post_init__(self) -> None:
        for name in ("queue", "batch_tokens", "max_body", "max_rows", "max_answer", "max_reading"):
            if getattr(self, name) < 1:
                raise VarloraError(f"Expected `{name}` to be a whole number >= 1, but got {getattr(self, name)}.")
        if self.max_answers < 2:
            raise VarloraError(f"Expected `max_answers` to be a number of answers >= 2, but got {self.max_answers}.")
        for name in ("max_tau", "body_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise VarloraError(f"Expected `{name}` to be a number > 0, but got {getattr(self, name)}.")
        object.__setattr__(self, "max_rows", min(self.max_rows, self.queue))

    @property
    def connections(self) -> int:
        """Open ones at a time: one for each row that waits and each body that is read, and half as many again."""
        return 3 * (self.queue + self.max_reading) // 2


class Refused(VarloraError):
    """A request or a row that is not answered: says why in words, by a code, and as an HTTP status."""

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None) -> None:
        message = safe(message)
        super().__init__(message if len(message) <= LONGEST_REASON else f"{message[:LONGEST_REASON]} ...")
        self.status = status
        self.code = code
        self.retry_after = retry_after
        """Seconds after which to try again."""


@dataclass(frozen=True)
class Use:
    """How a row is to be drawn; rows that are to be drawn alike share batches."""

    calibrated: bool
    """Whether the posterior is used as `varlora calibrate` chose."""
    tau: float
    """Factor of the variance of what was trained; if calibrated, the one that was chosen."""
    samples: int
    """Draws; 0: the mean."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """What the draws say of one row with C answers."""

    probs: Tensor
    """(C,) float64: probabilities averaged over the draws."""
    draws: Tensor
    """(S, C) float64: the probabilities of each draw."""
    uncertainty: dict[str, float]
    """`total`, `aleatoric` and `epistemic`, in nats."""


Draw = Callable[[Sequence[Encoded], Use], Tensor]
"""`draw(rows, use)`: class logits of S fixed models for B rows, (S, B, C), -inf where a row lacks the answer."""


class Watch(Protocol):
    """Who is told what the engine does; called from its thread, and from others that cancel."""

    def rows(self, outcome: str, count: int) -> None:
        """Rows were `answered`, `failed` or `dropped`."""

    def batch(self, rows: int, seconds: float) -> None:
        """A batch was drawn."""

    def waited(self, seconds: float) -> None:
        """A row has left the queue."""

    def out_of_memory(self) -> None:
        """A batch did not fit and was halved."""


def safe(text: str) -> str:
    r"""Return a text that UTF-8 can say: lone surrogates, which JSON lets through, are written out.

    Example:
        >>> safe("\ud800 x")
        '\\ud800 x'
    """
    return text.encode("utf-8", "backslashreplace").decode()


def where(error: BaseException) -> str:
    """Name an error's kind and the line that it came from; its words may quote a question, so they are left out."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"


def error_json(code: str, message: str) -> dict[str, Any]:
    """Return the body of every refusal."""
    return {"error": {"code": code, "message": message}}


CROWDED = "varlora.crowded"
"""In a request's scope: whether more connections are open than are taken; the server says so, the guard refuses."""
MISTAKE = error_json("internal", "The service made a mistake; its log says where.")
"""What is shown of an error that nobody thought of."""
