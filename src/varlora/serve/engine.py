"""The engine: a bounded queue of rows, and one thread that owns the model and works it off in batches.

The oldest row is always in the next batch; with it go those that are to be drawn alike and are nearest to it in length,
as long as the batch stays within its tokens. No row waits for a batch to fill: while one batch is drawn, the next one
gathers. What a batch cannot do is done by its halves, and a row that is not finite is drawn again alone, so that one
row costs the others nothing but time. After an error that leaves the accelerator unusable the engine ends.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from varlora.errors import VarloraError
from varlora.metrics import average_probs, uncertainty
from varlora.prompt import Encoded
from varlora.serve.base import Draw, Drawn, Refused, Use, Watch, where
from varlora.stack import out_of_memory

__all__ = ["Engine", "Slots", "drawn_of"]

LONGEST_WAIT = 60
"""Seconds that a refused client is told to wait at the most."""


@dataclass(eq=False)
class _Job:
    row: Encoded
    use: Use
    future: Future[Drawn] = field(default_factory=Future)
    since: float = field(default_factory=time.perf_counter)

    @property
    def length(self) -> int:
        return len(self.row.input_ids)


class Slots:
    """Room in the queue that a request holds while its rows are made ready."""

    def __init__(self, engine: Engine, count: int) -> None:
        self.engine, self.left = engine, count

    def submit(self, rows: Sequence[Encoded], use: Use) -> list[Future[Drawn]]:
        """Let rows wait in the slots; what becomes of each is in its future."""
        assert len(rows) <= self.left
        self.left -= len(rows)
        return self.engine._wait(rows, use)


class Engine:
    """Answers rows in batches, in one thread of its own.

    Args:
        draw: draws logits; only this engine's thread calls it.
        queue: rows that may wait.
        batch_tokens: tokens of a batch, padding included.
        watch: who is told what happens; left out: nobody.
        say: told where an error came from, without anybody's text; left out: nobody.

    Example:
        >>> engine = Engine(lambda rows, use: torch.zeros(2, len(rows), 2))
        >>> row, use = Encoded("1", (5, 6), (8, 9), None, False), Use(False, 1.0, 2)
        >>> with engine.reserved(1) as slots:
        ...     (future,) = slots.submit([row], use)
        >>> future.result().probs.tolist()
        [0.5, 0.5]
        >>> engine.close()
    """

    def __init__(
        self,
        draw: Draw,
        *,
        queue: int = 256,
        batch_tokens: int = 4096,
        watch: Watch | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.draw, self.queue, self.batch_tokens, self.watch, self.say = draw, queue, batch_tokens, watch, say
        self._jobs: list[_Job] = []  # the oldest first
        self._batch: list[_Job] = []  # what the thread works at
        self._mistake = ""  # where the first error of this batch came from
        self._reserved = 0
        self._changed = threading.Condition()
        self._stopping = self._ended = False
        self._row_seconds = 0.0
        self._thread = threading.Thread(target=self._work, name="varlora-engine", daemon=True)
        self._thread.start()

    # --- for those who ask

    @property
    def waiting(self) -> int:
        """Rows in the queue, and those that a place is kept for."""
        return len(self._jobs) + self._reserved

    @property
    def alive(self) -> bool:
        """Whether the thread works."""
        return self._thread.is_alive()

    @property
    def stopping(self) -> bool:
        """Whether no new rows are taken."""
        return self._stopping

    @property
    def retry_after(self) -> int:
        """Seconds after which the rows that wait now should be done, 1 to 60."""
        return max(1, min(LONGEST_WAIT, math.ceil(self.waiting * self._row_seconds)))

    def check_taking(self) -> None:
        """Raise if no new rows are taken.

        Raises:
            Refused: the engine stops, or has ended.
        """
        if self._stopping or not self.alive:
            raise Refused(503, "stopping", "The service is stopping and takes no new requests.", 1)

    @contextmanager
    def reserved(self, count: int) -> Iterator[Slots]:
        """Keep room for some rows; what is not submitted within the context is given back.

        Raises:
            Refused: there is no room for all of them, or the engine stops.
        """
        with self._changed:
            self.check_taking()
            if self.waiting + count > self.queue:
                raise Refused(
                    503,
                    "busy",
                    f"The queue of {self.queue} rows has no room for {count} more. Try again later.",
                    self.retry_after,
                )
            self._reserved += count
        slots = Slots(self, count)
        try:
            yield slots
        finally:
            with self._changed:
                self._reserved -= slots.left
                slots.left = 0
                self._changed.notify()

    def cancel(self, futures: Sequence[Future[Drawn]]) -> None:
        """Drop the rows that are not begun; their places in the queue are free at once."""
        gone = {id(future) for future in futures if future.cancel()}
        with self._changed:
            before = len(self._jobs)
            self._jobs = [job for job in self._jobs if id(job.future) not in gone]
            dropped = before - len(self._jobs)
        if dropped and self.watch:
            self.watch.rows("dropped", dropped)

    def stop(self) -> None:
        """Take no new rows; those that wait are still answered."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def close(self) -> None:
        """Stop, and wait until all that was taken is done."""
        self.stop()
        self._thread.join()

    # --- the thread

    def _wait(self, rows: Sequence[Encoded], use: Use) -> list[Future[Drawn]]:
        jobs = [_Job(row, use) for row in rows]
        with self._changed:
            self._reserved -= len(jobs)
            self._jobs += jobs
            self._changed.notify()
            if self._ended:
                self._give_up()
        return [job.future for job in jobs]

    def _work(self) -> None:
        try:
            while jobs := self._next():
                self._answer(jobs)
        except BaseException as error:  # without the thread nobody would ever answer those who wait
            self.say(f"The engine has ended and takes no more rows: {where(error)}.")
        finally:
            with self._changed:
                self._stopping = self._ended = True
                self._give_up()

    def _give_up(self) -> None:
        """Refuse the rows that nobody will answer; the lock is held."""
        left, self._batch, self._jobs = [*self._batch, *self._jobs], [], []
        for job in left:
            with contextlib.suppress(InvalidStateError):  # it is done, or its client has gone
                job.future.set_exception(Refused(500, "internal", "The service has broken down; its log says where."))

    def _answer(self, jobs: Sequence[_Job]) -> None:
        begun, self._mistake = time.perf_counter(), ""
        if self.watch:
            for job in jobs:
                self.watch.waited(begun - job.since)
        outcomes = self._drawn([job.row for job in jobs], jobs[0].use)
        seconds = time.perf_counter() - begun
        self._row_seconds += 0.2 * (seconds / len(jobs) - self._row_seconds)
        if self._mistake:
            self.say(f"Rows could not be answered: {self._mistake}.")
        if self.watch:
            failed = sum(isinstance(outcome, Refused) for outcome in outcomes)
            self.watch.batch(len(jobs), seconds)
            self.watch.rows("failed", failed)
            self.watch.rows("answered", len(jobs) - failed)
        for job, outcome in zip(jobs, outcomes):
            if isinstance(outcome, Refused):
                job.future.set_exception(outcome)
            else:
                job.future.set_result(outcome)

    def _next(self) -> list[_Job]:
        """Wait for rows and take a batch of them out of the queue; nothing once the engine stops and all is done."""
        while True:
            with self._changed:
                while not self._jobs:
                    if self._stopping and not self._reserved:
                        return []
                    self._changed.wait()
                oldest = self._jobs[0]
                alike = [job for job in self._jobs if job.use == oldest.use]
                alike.sort(key=lambda job: abs(job.length - oldest.length))  # stable: the oldest is the first
                batch: list[_Job] = []
                longest = 0
                for job in alike:
                    longest = max(longest, job.length)
                    if batch and longest * (len(batch) + 1) > self.batch_tokens:
                        break
                    batch.append(job)
                taken = set(batch)
                self._jobs = [job for job in self._jobs if job not in taken]
            self._batch = begun = [job for job in batch if job.future.set_running_or_notify_cancel()]
            if self.watch and len(begun) < len(batch):
                self.watch.rows("dropped", len(batch) - len(begun))
            if begun:
                return begun

    def _drawn(self, rows: Sequence[Encoded], use: Use) -> list[Drawn | Refused]:
        try:
            found = drawn_of(self.draw(rows, use), rows)
        except Exception as error:
            if _unusable(error):
                raise
            memory = out_of_memory(error)
            if not memory:
                refused = _refused(error)
                if not isinstance(error, VarloraError):
                    self._mistake = self._mistake or where(error)
            elif len(rows) > 1:
                longest = max(len(row.input_ids) for row in rows)
                self.batch_tokens = max(1, min(self.batch_tokens, longest * len(rows) // 2))
            else:
                refused = Refused(
                    500, "out_of_memory", f"A prompt of {len(rows[0].input_ids)} tokens does not fit the memory."
                )
        else:
            if len(rows) == 1:
                return found
            # in 16 bit the padding may overflow, and 0 times its values is NaN in the shorter rows
            return [self._drawn([row], use)[0] if _overflows(one) else one for row, one in zip(rows, found)]
        if memory:  # the frames that held the tensors are gone with the error
            if self.watch:
                self.watch.out_of_memory()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if len(rows) == 1:
            return [refused]
        half = len(rows) // 2
        return self._drawn(rows[:half], use) + self._drawn(rows[half:], use)


def drawn_of(logits: Tensor, rows: Sequence[Encoded]) -> list[Drawn | Refused]:
    """Return for each row what its draws say, or that they are no numbers.

    Args:
        logits: (S, B, C), -inf where a row does not have the answer.
        rows: B rows.

    Example:
        >>> row = Encoded("1", (5,), (8, 9), None, False)
        >>> fine, bad = drawn_of(torch.tensor([[[0.0, 0.0], [torch.nan, 0.0]]]), [row, row])
        >>> fine.probs.tolist(), bad.code
        ([0.5, 0.5], 'not_finite')
    """
    logits = logits.cpu()
    counts = torch.tensor([len(row.label_tokens) for row in rows])
    has = torch.arange(logits.shape[2])[None] < counts[:, None]  # (B, C)
    fine = (logits.isfinite() | ~has).all(dim=2).all(dim=0)  # (B,)
    logits = logits.masked_fill(~has, -math.inf)[:, fine]
    found: list[Drawn | Refused] = [
        Refused(
            500,
            "not_finite",
            "The model's logits are not finite, in one draw at least: they overflow. "
            "Ask with a smaller `tau`, or serve a base of another `dtype`.",
        )
        for _ in rows
    ]
    if fine.any():
        probs, draws, parts = average_probs(logits), logits.double().softmax(dim=-1), uncertainty(logits)
        for position, i in enumerate(fine.nonzero()[:, 0].tolist()):
            count = int(counts[i])
            values = {name: part[position].item() for name, part in parts._asdict().items()}
            found[i] = Drawn(probs[position, :count], draws[:, position, :count], values)
    return found


def _overflows(outcome: Drawn | Refused) -> bool:
    return isinstance(outcome, Refused) and outcome.code == "not_finite"


def _unusable(error: Exception) -> bool:
    """Whether an error is the accelerator's and not one of memory: after an illegal access, say, every call fails."""
    kind = getattr(torch, "AcceleratorError", ())  # of torch >= 2.8
    return isinstance(error, kind) and "out of memory" not in str(error)


def _refused(error: Exception) -> Refused:
    """What is wrong with a row that an error is about; the texts of other libraries stay here."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, VarloraError):
        return Refused(422, "refused", str(error))
    return Refused(500, "internal", f"The model could not answer this row ({type(error).__name__}).")
