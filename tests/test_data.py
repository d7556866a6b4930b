"""Batches: left padding, masks, the token budget, and every row of the real data under a model's context."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from varlora.data import collate, encode_all, token_batches
from varlora.errors import VarloraError
from varlora.prompt import Encoded, encode
from varlora.tasks import TASKS, get_task, load_rows

RECIPE = Path(__file__).parents[1] / "recipes" / "local" / "sst2.yaml"


def test_collate_pads_on_the_left():
    rows = [Encoded("a", (5, 6, 7), (8, 9), 1, False), Encoded("b", (4,), (8, 9, 10), None, True)]
    batch = collate(rows, pad_token_id=2)
    expected = {
        "input_ids": torch.tensor([[5, 6, 7], [2, 2, 4]]),
        "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 1]]),
        "label_tokens": torch.tensor([[8, 9, 0], [8, 9, 10]]),
        "answer_mask": torch.tensor([[True, True, False], [True, True, True]]),
        "labels": torch.tensor([1, -1]),
    }
    assert type(batch) is dict
    assert batch.keys() == expected.keys()
    for name, tensor in expected.items():
        assert batch[name].dtype == tensor.dtype
        assert torch.equal(batch[name], tensor)


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 200))
def test_token_batches(lengths, budget):
    batches = token_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    in_order = [lengths[index] for batch in batches for index in batch]
    assert in_order == sorted(lengths, reverse=True)
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) * longest <= budget or len(batch) == 1
    for batch in batches[:-1]:  # no batch ends before it must
        assert (len(batch) + 1) * lengths[batch[0]] > budget


def test_token_budget_out_of_range():
    with pytest.raises(VarloraError, match="`budget` to be a number of tokens >= 1, but got 0"):
        token_batches([1], 0)


def test_encode_all_is_encode_of_each(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories-260k")
    examples = load_rows(TASKS["boolq"], "dev", shared / "data").examples[:20]
    encoded = encode_all(tokenizer, examples, max_length=400)
    assert encoded.rows == [encode(tokenizer, example, max_length=400) for example in examples]
    assert encoded.cut == sum(row.cut for row in encoded.rows) > 0
    assert encode_all(tokenizer, []).rows == []


@pytest.mark.parametrize("name", [*TASKS, "sst2"])
def test_all_real_rows_fit_a_small_context_with_their_end_in_place(shared, name):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "tinyllama-3m")
    task = get_task(RECIPE if name == "sst2" else name)
    cut = 0
    for split in ("dev",) if name == "sst2" else task.files:
        examples = load_rows(task, split, shared / "data").examples
        encoded = encode_all(tokenizer, examples, max_length=256)
        cut += encoded.cut
        for example, row in zip(examples, encoded.rows):
            assert 0 < len(row.input_ids) <= 256
            assert row.input_ids[0] == tokenizer.bos_token_id
            assert len(row.label_tokens) == len(example.answers)
            text = str(tokenizer.decode(list(row.input_ids), skip_special_tokens=True))
            assert text.startswith(example.head.rstrip())
            assert text.endswith(example.tail)
            if not row.cut:
                assert text == example.prompt
    assert (cut > 0) == (name in ("arc_challenge", "arc_easy", "boolq"))
