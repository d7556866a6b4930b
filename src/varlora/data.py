"""From encoded examples to batches: left padding, and batches of similar length under a budget of tokens."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from varlora.errors import VarloraError
from varlora.prompt import Encoded, encode, prompt_ids
from varlora.tasks.base import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Batch", "EncodedSet", "collate", "encode_all", "token_batches"]

Batch = dict[str, Tensor]
"""`input_ids` (B, T) int64 and `attention_mask` (B, T) int64, padded on the left; `label_tokens` (B, C) int64 and
`answer_mask` (B, C) bool, False where a row has fewer than C answers; `labels` (B,) int64, -1 where unknown."""


@dataclass(frozen=True)
class EncodedSet:
    """Encoded examples, in their order, and how many of them were cut."""

    rows: list[Encoded]
    """One for each example; the list serves as a dataset of `transformers.Trainer`."""
    cut: int
    """Prompts longer than `max_length`."""


def encode_all(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int | None = None, chat: bool = False
) -> EncodedSet:
    """Encode examples as `encode` does, tokenising all prompts in one call.

    Args:
        tokenizer: any tokenizer of `transformers`.
        examples: N examples.
        max_length: tokens; None: no limit.
        chat: put the prompts through the tokenizer's chat template.
    """
    ids = prompt_ids(tokenizer, [example.prompt for example in examples], chat)
    rows = [encode(tokenizer, example, max_length, chat, ids=row) for example, row in zip(examples, ids)]
    return EncodedSet(rows, sum(row.cut for row in rows))


def collate(rows: Sequence[Encoded], pad_token_id: int) -> Batch:
    """Make a batch, padded on the left so that the last position is each prompt's end.

    Args:
        rows: B encoded examples.
        pad_token_id: the token to pad with; it is masked, so any will do.

    Example:
        >>> rows = [Encoded("1", (5, 6, 7), (8, 9), 1, False), Encoded("2", (5,), (8, 9, 10), None, False)]
        >>> batch = collate(rows, pad_token_id=0)
        >>> batch["input_ids"].tolist(), batch["answer_mask"].tolist(), batch["labels"].tolist()
        ([[5, 6, 7], [0, 0, 5]], [[True, True, False], [True, True, True]], [1, -1])
    """
    length = max(len(row.input_ids) for row in rows)
    answers = max(len(row.label_tokens) for row in rows)
    gaps = [length - len(row.input_ids) for row in rows]
    spare = [answers - len(row.label_tokens) for row in rows]
    return {
        "input_ids": _matrix([(*(pad_token_id,) * gap, *row.input_ids) for gap, row in zip(gaps, rows)]),
        "attention_mask": _matrix([(0,) * gap + (1,) * (length - gap) for gap in gaps]),
        "label_tokens": _matrix([(*row.label_tokens, *(0,) * few) for few, row in zip(spare, rows)]),
        "answer_mask": _matrix([(1,) * (answers - few) + (0,) * few for few in spare], "b", torch.bool),
        "labels": _matrix([(-1 if row.label is None else row.label,) for row in rows]).view(-1),
    }


def _matrix(rows: Sequence[tuple[int, ...]], code: str = "q", dtype: torch.dtype = torch.int64) -> Tensor:
    """Return B rows of length T >= 1 as (B, T), by way of an array: torch takes far longer for nested rows."""
    return torch.frombuffer(array(code, chain.from_iterable(rows)), dtype=dtype).view(len(rows), -1)


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group rows of similar length into batches of at most `budget` tokens, padding included; longest first.

    The first batch is the largest, so a lack of memory shows at once. A row longer than the budget is alone.

    Args:
        lengths: tokens of each of the N rows.
        budget: tokens a batch, rows times the longest of them.

    Returns:
        Batches of row numbers; each of 0 ... N-1 occurs once.

    Raises:
        VarloraError: `budget` below 1.

    Example:
        >>> token_batches([3, 9, 4, 8], budget=18)
        [[1, 3], [2, 0]]
    """
    if budget < 1:
        raise VarloraError(f"Expected `budget` to be a number of tokens >= 1, but got {budget}. Pass e.g. 4096.")
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
