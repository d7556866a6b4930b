"""The tokens that rows begin with: run once for each draw, and not once more for each row and each batch.

An instruction before the question, or examples, are the same in every row. A causal model makes the same keys and
values of them, so they are computed for one row, and the others go on from there, those of later batches as well. That
changes no number but by rounding.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from varlora.blocks import FAMILIES, acts_from_tokens_on, architecture, patched

__all__ = ["Beginning", "begun", "continued", "divided"]

LEAST_SAVED = 0.25
"""Share of a pass's tokens that has to be saved for a second pass to be worth it."""
KEPT_BYTES = 2**30
"""Memory that the keys and values kept from batch to batch may take."""
BY_LENGTH = ("dynamic", "longrope")
"""Kinds of rotary positions that depend on how long a pass is."""


def divided(
    model: nn.Module, batch: Mapping[str, Any], before: Tensor | None = None
) -> tuple[Tensor, dict[str, Any]] | None:
    """Divide a batch into what all its rows begin with and what follows.

    Args:
        model: the model that it is for.
        batch: `input_ids` (B, T), padded on the left; `attention_mask` (B, T), 0 at padding; other keys stay.
        before: (1, Q) tokens that rows before this batch began with, if the keys and values of what all have in common
            are kept: then it is worth it for a single row.

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
    if (rows < 2 and before is None) or not _goes_on(model, width):
        return None
    places = torch.arange(width, device=ids.device)
    gaps = width - mask.sum(1)  # (B,)
    if not torch.equal(mask.bool(), places >= gaps[:, None]):
        return None
    shortest = width - int(gaps.max())
    starts = ids.gather(1, gaps[:, None] + places[:shortest])  # (B, shortest)

    def in_common(others: Tensor) -> int:
        length = min(shortest, others.shape[1])
        alike = (starts[:, :length] == others[:, :length]).all(0)
        return min(int(alike.int().cumprod(0).sum()), shortest - 1)

    tokens, alone = 0 if before is None else in_common(before.to(ids.device)), in_common(starts[:1])
    saved = max(tokens * rows, alone * (rows - 1))
    if saved < LEAST_SAVED * rows * width:
        return None
    if saved > tokens * rows:
        tokens = alone
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


class Beginning:
    """What rows began with in earlier batches, and the keys and values of it for each draw.

    A batch that begins as the one before it did is divided there, even a single row; from then on its keys and values
    are kept, if they are small enough, and used for as long as rows begin so and the model's frozen weights stay what
    they are; a change that torch does not count, through `.data`, goes unseen.

    Args:
        draws: of a stack, D.
    """

    def __init__(self, draws: int) -> None:
        self.draws = draws
        self._tokens: Tensor | None = None  # (1, P), what rows began with; or those of one row that began otherwise
        self._cache: Any = None
        self._made_as: Any = None
        self._too_large = False
        self.keeps = False
        """Whether the keys and values of the batch that was divided last are kept."""

    def divided(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]] | None:
        """Divide a batch as the function of that name does, where earlier ones were divided if it begins alike."""
        room = 0
        fits = architecture(model) in FAMILIES and not self._too_large
        if fits and not torch.is_grad_enabled():  # they would hold on to the first batch
            room = KEPT_BYTES // (self.draws * _bytes_of_token(model))
        if not room:
            self.keeps = False
            return divided(model, batch)
        parts = divided(model, batch, None if self._tokens is None else self._tokens[:, :room])
        first = parts[0] if parts else batch["input_ids"][:1, batch["attention_mask"][0].bool()]
        one = next(model.parameters())
        kind = one.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        made_as = (weakref.ref(model), one.device, one.dtype, autocast, _version(model))
        alike = self._tokens is not None and torch.equal(first, self._tokens.to(first.device))
        if not alike or made_as != self._made_as:
            self._tokens, self._cache, self._made_as = first, None, made_as
        self.keeps = first.shape[1] <= room
        return parts

    def keep_none(self) -> None:
        """Keep no keys and values from now on, as there is no memory for those of all draws."""
        self.keeps, self._cache, self._too_large = False, None, True

    def cache(self, start: int, stop: int, make: Callable[[int, int], Any], at_once: int) -> Any:
        """Return the keys and values of what the batch begins with, for draws `start` to `stop`.

        Args:
            start: of 0 to D.
            stop: of 0 to D.
            make: `make(start, stop)` computes them.
            at_once: how many of all draws' it may compute at once, where they are kept.
        """
        if not self.keeps:
            return make(start, stop)
        if self._cache is None:
            starts = range(0, self.draws, at_once)
            self._cache = _joined([make(at, min(at + at_once, self.draws)) for at in starts])
        return _part(self._cache, start, stop)


def _joined(caches: Sequence[Any]) -> Any:
    """Return one cache with the copies of several, one after the other."""
    whole = caches[0]
    for layer, *others in zip(*(cache.layers for cache in caches)):
        layer.keys = torch.cat([layer.keys, *(other.keys for other in others)])
        layer.values = torch.cat([layer.values, *(other.values for other in others)])
    return whole


def _part(cache: Any, start: int, stop: int) -> Any:
    """Return a cache with some of the copies; however it is used, the whole one stays as it is."""
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in found.layers:
        layer.keys, layer.values = layer.keys[start:stop], layer.values[start:stop]
    return found


def _bytes_of_token(model: nn.Module) -> int:
    """Return about how many bytes the keys and values of a token take in a model of `FAMILIES`."""
    config: Any = model.config
    heads = config.num_attention_heads
    share = (getattr(config, "num_key_value_heads", None) or heads) / heads
    return int(2 * config.num_hidden_layers * config.hidden_size * share * next(model.parameters()).dtype.itemsize)


def _version(model: nn.Module) -> int:
    """Return a number that grows with each change of the frozen weights in place; the others are swapped as it is."""
    return sum(p._version for p in model.parameters() if not p.requires_grad and not p.is_inference())


def _goes_on(model: nn.Module, width: int) -> bool:
    """Whether a model of such width gives the same for tokens that are run in two parts, padding between them."""
    if model.training or architecture(model) not in FAMILIES:
        return False  # in training, rows have dropout of their own
    if acts_from_tokens_on(model):
        return False  # which may be in the first part
    config: Any = model.config
    if getattr(config, "use_bidirectional_attention", False):
        return False  # what follows would be seen from before
    window = getattr(config, "sliding_window", None)
    if window is not None and window < width:
        return False  # padding would count as distance
    return not any(kind in str(getattr(config, "rope_parameters", None)) for kind in BY_LENGTH)
