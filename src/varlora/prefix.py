"""The tokens that all rows of a batch begin with: run once for each draw, and not once more for each row.

An instruction before the question, or examples, are the same in every row. A causal model makes the same keys and
values of them, so they are computed for one row, and the others go on from there. That changes no number but by
rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from varlora.blocks import FAMILIES, architecture, patched

__all__ = ["begun", "continued", "divided"]

LEAST_SAVED = 0.25
"""Share of a pass's tokens that has to be saved for a second pass to be worth it."""
BY_LENGTH = ("dynamic", "longrope")
"""Kinds of rotary positions that depend on how long a pass is."""


def divided(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]] | None:
    """Divide a batch into what all its rows begin with and what follows.

    Args:
        model: the model that it is for.
        batch: `input_ids` (B, T), padded on the left; `attention_mask` (B, T), 0 at padding; other keys stay.

    Returns:
        The first P tokens, (1, P), and the batch without them, padded on the left to the longest rest; a token is left
        of each row at the least. None if they are too few to be worth it, or the model cannot go on from them.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=16)).eval()
        >>> ids, mask = torch.tensor([[0, 7, 8, 3], [7, 8, 5, 6]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
        >>> first, rest = divided(model, {"input_ids": ids, "attention_mask": mask})
        >>> first.tolist(), rest["input_ids"].tolist(), rest["attention_mask"].tolist()
        ([[7, 8]], [[8, 3], [5, 6]], [[0, 1], [1, 1]])
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    rows, width = ids.shape
    if rows < 2 or not _goes_on(model, width):
        return None
    places = torch.arange(width, device=ids.device)
    gaps = width - mask.sum(1)  # (B,)
    if not torch.equal(mask.bool(), places >= gaps[:, None]):
        return None
    shortest = width - int(gaps.max())
    starts = ids.gather(1, gaps[:, None] + places[:shortest])  # (B, shortest)
    alike = (starts == starts[:1]).all(0)
    tokens = min(int(alike.int().cumprod(0).sum()), shortest - 1)
    if tokens * (rows - 1) < LEAST_SAVED * rows * width:
        return None
    left = int(gaps.min()) + tokens
    after = (places >= gaps[:, None] + tokens).to(mask.dtype)
    return starts[:1, :tokens], {**batch, "input_ids": ids[:, left:], "attention_mask": after[:, left:]}


def begun(model: nn.Module, first: Tensor, copies: int) -> Any:
    """Return the keys and values of the first tokens, for as many copies of them.

    Args:
        model: a model that `divided` has divided a batch for.
        first: (1, P) tokens.
        copies: rows to run them in, one for each draw.

    Returns:
        transformers' cache.
    """
    ids = first.to(next(model.parameters()).device).expand(copies, -1)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1).past_key_values


@contextmanager
def continued(model: nn.Module, cache: Any, rows: int) -> Iterator[None]:
    """Within the context, a model's one pass goes on from the first tokens.

    Args:
        model: the model.
        cache: what `begun` returned for C copies; it is used up.
        rows: rows of each copy; the model is given C·rows, copy after copy.
    """
    cache.batch_repeat_interleave(rows)
    whole, length = model.forward, cache.get_seq_length()

    def forward(attention_mask: Tensor, position_ids: Tensor, **inputs: Any) -> Any:
        before = attention_mask.new_ones(len(attention_mask), length)
        return whole(
            attention_mask=torch.cat([before, attention_mask], 1),
            position_ids=position_ids + length,
            past_key_values=cache,
            **inputs,
        )

    with patched([(model, forward)]):
        yield


def _goes_on(model: nn.Module, width: int) -> bool:
    """Whether a model of such width gives the same for tokens that are run in two parts, padding between them."""
    if model.training or architecture(model) not in FAMILIES:
        return False  # in training, rows have dropout of their own
    config: Any = model.config
    window = getattr(config, "sliding_window", None)
    if window is not None and window < width:
        return False  # padding would count as distance
    return not any(kind in str(getattr(config, "rope_parameters", None)) for kind in BY_LENGTH)
