"""The engine: what shares a batch, what is refused, dropped or fails, and that every row is answered once."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter

import pytest
import torch
from serve_helpers import USE, Held, numbered, row_of, submitted, until
from transformers import LlamaConfig, LlamaForCausalLM

from varlora.data import collate
from varlora.metrics import average_probs, uncertainty
from varlora.model import class_logits
from varlora.prompt import Encoded
from varlora.serve.base import Refused, Use
from varlora.serve.engine import Engine, drawn_of


class Watched:
    """Notes what the engine tells."""

    def __init__(self) -> None:
        self.outcomes, self.batches, self.waits, self.memory = Counter(), [], 0, 0

    def rows(self, outcome, count):
        self.outcomes[outcome] += count

    def batch(self, rows, seconds):
        self.batches.append(rows)

    def waited(self, seconds):
        self.waits += 1

    def out_of_memory(self):
        self.memory += 1


def probs_of(row, use=USE):
    return average_probs(numbered([row], use))[0]


@pytest.fixture
def made():
    """Make engines that are closed in the end."""
    engines = []

    def make(draw=numbered, **settings):
        engines.append(Engine(draw, **settings))
        return engines[-1]

    yield make
    for engine in engines:
        if isinstance(engine.draw, Held):
            engine.draw.go.set()
        engine.close()
        assert not engine.alive


def held_up(made, draw=numbered, **settings):
    """Return an engine that is busy with row 0."""
    held = Held(draw)
    engine = made(held, **settings)
    first = submitted(engine, [row_of(0)])
    assert held.begun.wait(timeout=30)
    return engine, held, first


# --- batches


def test_the_oldest_row_goes_first_with_those_nearest_in_length_within_the_tokens(made):
    engine, held, _ = held_up(made, batch_tokens=40)
    submitted(engine, [row_of(1, 10), row_of(2, 30), row_of(3, 9), row_of(4, 11), row_of(5, 50), row_of(6, 10)])
    held.go.set()
    engine.close()
    assert held.batches == [["0"], ["1", "6", "3"], ["2"], ["4"], ["5"]]


def test_rows_of_another_use_do_not_share_a_batch_and_do_not_starve(made):
    engine, held, _ = held_up(made)
    other = Use(False, 0.5, 2)
    futures = [submitted(engine, [row_of(i)], other if i % 2 else USE)[0] for i in range(1, 7)]
    held.go.set()
    engine.close()
    assert held.batches == [["0"], ["1", "3", "5"], ["2", "4", "6"]]
    assert torch.equal(futures[0].result().probs, probs_of(row_of(1), other))


def test_what_gathers_while_a_batch_is_drawn_goes_together(made):
    engine, held, first = held_up(made)
    for i in range(1, 20):
        submitted(engine, [row_of(i)])
    held.go.set()
    engine.close()
    assert first[0].done()
    assert list(map(len, held.batches)) == [1, 19]


def test_many_who_ask_at_once_get_their_own_answers_once(made):
    watch, source = Watched(), random.Random(0)
    engine = made(queue=10_000, batch_tokens=64, watch=watch)
    rows = [row_of(i, source.randint(1, 30), source.randint(2, 5)) for i in range(600)]
    uses = [Use(False, source.choice((0.5, 1.0)), 2) for _ in rows]
    found = {}

    def ask(part):
        for i in part:
            (future,) = submitted(engine, [rows[i]], uses[i])
            found[i] = future.result(timeout=30)

    threads = [threading.Thread(target=ask, args=(range(k, 600, 8),)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(600))
    for i, drawn in found.items():
        assert torch.allclose(drawn.probs, probs_of(rows[i], uses[i]))
    assert watch.outcomes == {"answered": 600, "failed": 0}
    assert sum(watch.batches) == watch.waits == 600
    assert engine.waiting == 0


def test_numbers_are_those_of_the_metrics():
    logits = torch.randn(5, 3, 4)
    logits[:, 1, 2:] = -torch.inf
    rows = [row_of(0, answers=4), row_of(1, answers=2), row_of(2, answers=4)]
    for i, drawn in enumerate(drawn_of(logits, rows)):
        count = len(rows[i].label_tokens)
        own = logits[:, i : i + 1, :count]
        assert torch.allclose(drawn.probs, average_probs(own)[0])
        assert torch.allclose(drawn.draws, own[:, 0].double().softmax(1))
        assert drawn.uncertainty == pytest.approx({k: v.item() for k, v in uncertainty(own)._asdict().items()})


# --- the queue


def test_a_full_queue_refuses_and_takes_again_when_there_is_room(made):
    engine, held, _ = held_up(made, queue=3)
    submitted(engine, [row_of(1), row_of(2)])
    with pytest.raises(Refused, match="no room for 2 more") as refused, engine.reserved(2):
        raise AssertionError("never here")
    assert (refused.value.status, refused.value.code) == (503, "busy")
    assert 1 <= refused.value.retry_after <= 60
    submitted(engine, [row_of(3)])
    assert engine.waiting == 3
    held.go.set()
    until(lambda: engine.waiting == 0)
    submitted(engine, [row_of(4), row_of(5), row_of(6)])


def test_places_that_are_not_used_are_given_back(made):
    engine = made(queue=2)
    with pytest.raises(ZeroDivisionError), engine.reserved(2):
        _ = 1 / (engine.waiting - 2)
    with engine.reserved(2) as slots:
        slots.submit([row_of(1)], USE)
    until(lambda: engine.waiting == 0)


def test_the_time_to_wait_grows_with_the_queue(made):
    engine, _, _ = held_up(made)
    engine._row_seconds = 2.0
    assert engine.retry_after == 1
    submitted(engine, [row_of(i) for i in range(1, 6)])
    assert engine.retry_after == 10
    submitted(engine, [row_of(i) for i in range(6, 100)])
    assert engine.retry_after == 60


def test_what_is_cancelled_is_not_drawn_and_leaves_its_place(made):
    watch = Watched()
    engine, held, first = held_up(made, queue=4, watch=watch)
    futures = submitted(engine, [row_of(1), row_of(2)])
    kept = submitted(engine, [row_of(3)])
    engine.cancel([*first, *futures])  # the first has begun
    assert engine.waiting == 1
    held.go.set()
    engine.close()
    assert held.batches == [["0"], ["3"]]
    assert first[0].result()
    assert kept[0].result()
    assert watch.outcomes == {"answered": 2, "failed": 0, "dropped": 2}


def test_closing_finishes_what_was_taken_and_takes_nothing_more(made):
    engine, held, first = held_up(made)
    later = submitted(engine, [row_of(i) for i in range(1, 30)])
    with engine.reserved(1) as slots:
        engine.stop()
        with pytest.raises(Refused, match="stopping") as refused, engine.reserved(1):
            raise AssertionError("never here")
        assert refused.value.status == 503
        held.go.set()
        until(lambda: all(future.done() for future in later))
        assert engine.alive  # a place is kept still
        (last,) = slots.submit([row_of(99)], USE)
    engine.close()
    assert torch.equal(last.result().probs, probs_of(row_of(99)))
    assert first[0].done()


# --- what goes wrong


def test_if_the_thread_ends_all_who_wait_are_told_and_nobody_else_is_taken(made):
    class Broken(Watched):
        def batch(self, rows, seconds):
            raise LookupError("the user's secret")

    said = []
    engine, held, first = held_up(made, watch=Broken(), say=said.append)
    later = submitted(engine, [row_of(1), row_of(2)])
    with engine.reserved(1) as slots:
        held.go.set()
        until(lambda: not engine.alive)
        last = slots.submit([row_of(3)], USE)
    for future in [*first, *later, *last]:
        with pytest.raises(Refused) as refused:
            future.result(timeout=30)
        assert (refused.value.status, refused.value.code) == (500, "internal")
    assert engine.stopping
    assert engine.waiting == 0
    with pytest.raises(Refused, match="no new requests"), engine.reserved(1):
        raise AssertionError("never here")
    assert len(said) == 1
    assert "LookupError in test_engine.py, line " in said[0]
    assert "secret" not in said[0]


def test_the_place_of_an_error_is_said_once_a_batch(made):
    def draw(rows, use):
        raise RuntimeError("the user's secret")

    said = []
    engine, held, _ = held_up(made, draw, say=said.append)
    futures = submitted(engine, [row_of(i) for i in range(1, 9)])
    held.go.set()
    assert all(future.exception(timeout=30) for future in futures)
    until(lambda: len(said) == 2)  # of row 0, and of the eight
    assert all("RuntimeError in test_engine.py, line " in text and "secret" not in text for text in said)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_overflows_fails_alone(made, value):
    def draw(rows, use):
        logits = numbered(rows, use)
        for i, row in enumerate(rows):
            if row.id == "2":
                logits[1, i, 0] = value  # in one draw, of one answer
        return logits

    watch = Watched()
    engine, held, _ = held_up(made, draw, watch=watch)
    futures = submitted(engine, [row_of(1), row_of(2), row_of(3, answers=4)])
    held.go.set()
    with pytest.raises(Refused, match="not finite") as refused:
        futures[1].result(timeout=30)
    assert (refused.value.status, refused.value.code) == (500, "not_finite")
    for future, row in ((futures[0], row_of(1)), (futures[2], row_of(3, answers=4))):
        assert torch.allclose(future.result(timeout=30).probs, probs_of(row))
    until(lambda: watch.outcomes["answered"] == 3)
    assert watch.outcomes["failed"] == 1


def test_a_row_is_not_refused_for_the_padding_of_its_batch(made):
    """In float16 the padding may overflow: its values are NaN then, and 0 times them is NaN in the shorter rows."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).half().eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 65504.0
        model.model.layers[0].mlp.down_proj.weight *= 60

    @torch.no_grad()
    def draw(rows, use):
        return class_logits(model, collate(rows, 0))[None].expand(2, -1, -1)

    rows = [Encoded(str(i), tuple(range(1, n + 1)), (8, 9), None, False) for i, n in enumerate((4, 7, 9, 4), 1)]
    refused = [outcome for outcome in drawn_of(draw(rows, USE), rows) if isinstance(outcome, Refused)]
    assert len(refused) == 3
    watch = Watched()
    engine, held, _ = held_up(made, draw, watch=watch)
    futures = submitted(engine, rows)
    held.go.set()
    for future, row in zip(futures, rows):
        assert torch.allclose(future.result(timeout=30).probs, average_probs(draw([row], USE))[0], atol=1e-3)
    assert held.batches == [["0"], ["1", "4", "2", "3"], ["1"], ["4"], ["2"]]
    assert watch.batches == [1, 4]


@pytest.mark.parametrize("error", [RuntimeError("the user's secret"), KeyError("the user's secret")])
def test_a_row_that_the_model_cannot_bear_fails_alone_and_without_the_librarys_words(made, error):
    def draw(rows, use):
        if any(row.id == "5" for row in rows):
            raise error
        return numbered(rows, use)

    engine, held, _ = held_up(made, draw)
    futures = submitted(engine, [row_of(i) for i in range(1, 9)])
    held.go.set()
    for i, future in enumerate(futures, 1):
        if i == 5:
            with pytest.raises(Refused, match=type(error).__name__) as refused:
                future.result(timeout=30)
            assert "secret" not in str(refused.value)
        else:
            assert torch.allclose(future.result(timeout=30).probs, probs_of(row_of(i)))


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="torch < 2.8 has no such error")
@pytest.mark.parametrize(
    ("text", "ends"), [("an illegal memory access was encountered", True), ("out of memory", False)]
)
def test_an_accelerator_that_cannot_go_on_ends_the_engine(made, text, ends):
    def draw(rows, use):
        if rows[-1].id == "2":
            raise torch.AcceleratorError(f"CUDA error: {text}")
        return numbered(rows, use)

    said = []
    engine, held, first = held_up(made, draw, batch_tokens=4, say=said.append)
    futures = submitted(engine, [row_of(1), row_of(2), row_of(3)])
    held.go.set()
    assert first[0].result(timeout=30)
    assert futures[0].result(timeout=30)
    assert futures[1].exception(timeout=30).code == "internal"
    if ends:
        assert futures[2].exception(timeout=30).code == "internal"
        until(lambda: not engine.alive)
        assert len(said) == 1
        assert "has ended" in said[0]
    else:
        assert futures[2].result(timeout=30)
        assert engine.alive


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_without_memory_batches_are_halved_and_stay_small(made, error):
    def draw(rows, use):
        if len(rows) > 3:
            raise error
        return numbered(rows, use)

    watch = Watched()
    engine, held, _ = held_up(made, draw, batch_tokens=1000, watch=watch)
    futures = submitted(engine, [row_of(i) for i in range(1, 13)])
    held.go.set()
    for i, future in enumerate(futures, 1):
        assert torch.allclose(future.result(timeout=30).probs, probs_of(row_of(i)))
    assert watch.memory == 3  # of 12, and of both sixes
    assert engine.batch_tokens == 12  # three rows of four tokens
    assert watch.outcomes["failed"] == 0


def test_a_row_too_large_for_the_memory_fails_and_the_engine_goes_on(made):
    def draw(rows, use):
        if any(len(row.input_ids) > 100 for row in rows):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return numbered(rows, use)

    engine = made(draw, batch_tokens=1000)
    large, small = submitted(engine, [row_of(1, 101), row_of(2, 99)])
    with pytest.raises(Refused, match="101 tokens does not fit"):
        large.result(timeout=30)
    assert small.result(timeout=30)
    assert submitted(engine, [row_of(3, 50)])[0].result(timeout=30)


def test_the_time_to_wait_is_that_of_a_row_and_not_of_its_batch(made):
    def draw(rows, use):
        time.sleep(0.25)
        return numbered(rows, use)

    engine = made(draw, queue=10_000)
    for future in submitted(engine, [row_of(i) for i in range(20)]):
        future.result(timeout=30)
    with engine.reserved(2000):  # at 1/5 of 0.25 s for 20 rows: the first batch counts for a fifth
        assert 5 <= engine.retry_after < 60
