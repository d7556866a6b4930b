"""The repeated blocks of a transformer, and what of them need not be computed for every draw or every position.

Draws differ only from the first block on that has a drawn weight. What lies below is the same for all of them, and so
is what the block's frozen layers make of its input. In the last block, nothing matters but the last position, where the
answer is read, and the keys and values of the others. Both change no number but by rounding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

__all__ = [
    "acts_from_tokens_on",
    "block_of",
    "blocks_at",
    "first_output_shared",
    "last_position",
    "patched",
    "positions_shared",
    "repeated",
    "resumable",
    "resumed",
    "state_at",
]

NUMBERED = re.compile(r"(.+?)\.(\d+)\.")

FAMILIES = (
    "cohere",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "stablelm",
)
"""Architectures whose blocks are attention and an MLP under the names below; a test compares each with a plain pass."""
RESUMABLE = (
    *FAMILIES,
    *("bloom", "falcon", "gpt_bigcode", "gptj", "mixtral", "mpt", "opt", "phi", "qwen2_moe", "starcoder2"),
)
"""Architectures of which a later block needs nothing of the earlier ones but their hidden states; tested as well."""
SEES_INPUT = ("input_layernorm", "ln_1", "q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "attn.c_attn")
"""Ends of the names of layers that see a block's input, or its norm."""
AFTER_ATTENTION = ("o_proj", "attn.c_proj", "attention.dense", "mlp")
"""Ends of the names of layers that see one position at a time, and only add to it."""
ASK_A_CACHE = tuple(family for family in FAMILIES if family not in ("gpt2", "gpt_neox"))
"""Architectures whose blocks hand keys and values to the cache that they are given by name, and take all from it."""
HEADS_APART = tuple(family for family in ASK_A_CACHE if family not in ("olmo2", "phi3", "stablelm"))
"""Of these, the ones in which what becomes of a head's query does not depend on how many heads there are."""


class _Reached(Exception):
    """What was wanted of a pass is known."""


def block_of(name: str) -> tuple[str, int] | None:
    """Return the list of blocks that a parameter lies in, and the block's number there.

    Example:
        >>> block_of("base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight")
        ('base_model.model.model.layers', 3)
        >>> block_of("lm_head.weight")
    """
    found = NUMBERED.match(name)
    return (found[1], int(found[2])) if found else None


@contextmanager
def patched(replacements: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Within the context, modules have other forward functions; after it, their own."""
    before: list[tuple[nn.Module, Any]] = []
    try:
        for module, forward in replacements:
            before.append((module, vars(module).get("forward")))
            module.forward = forward
        yield
    finally:
        for module, own in reversed(before):
            if own is None:
                del module.forward
            else:
                module.forward = own


def state_at(blocks: nn.ModuleList, at: int, run: Callable[[], Any]) -> tuple[Tensor, Any]:
    """Run a model up to a block.

    Args:
        blocks: the model's blocks.
        at: number of the block, >= 1.
        run: runs the model.

    Returns:
        The hidden states that the block is given, (B, T, D), and what the block before it returned.
    """
    found: list[Tensor] = []
    outputs: list[Any] = []

    def reached(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    def returned(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(output)

    hooks = [
        blocks[at].register_forward_pre_hook(reached, with_kwargs=True),
        blocks[at - 1].register_forward_hook(returned),
    ]
    try:
        run()
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return found[0], outputs[0]


@contextmanager
def resumed(model: Any, blocks: nn.ModuleList, at: int, state: Tensor, like: Any) -> Iterator[None]:
    """Within the context, a model goes on at a block from given hidden states; what lies below is left out.

    Args:
        model: an architecture of `RESUMABLE`.
        blocks: its blocks.
        at: number of the block to go on at, >= 1.
        state: (N, T, D), what that block is to be given.
        like: what the block before it returns: hidden states, or a tuple that begins with them.
    """
    output = (state, *like[1:]) if isinstance(like, tuple) else state
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    unread = []  # what comes of it goes into the blocks that are left out
    if isinstance(embedding, nn.Embedding) and embedding.embedding_dim == state.shape[-1]:
        unread.append((embedding, lambda ids: state.to(ids.device)))
    with (
        patched(unread),
        patched((block, lambda *args, **kwargs: output) for block in blocks[:at]),
    ):
        yield


@contextmanager
def positions_shared(model: nn.Module, copies: int) -> Iterator[None]:
    """Within the context, rotary angles are computed once for all copies in the batch.

    Args:
        model: an architecture of `FAMILIES`; with another one nothing is changed.
        copies: equal parts, one after the other, of the batch.
    """

    def once(whole: Callable[..., Any]) -> Callable[..., Any]:
        def forward(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            rows = len(position_ids)  # 1 where all rows have the same
            found = whole(x, position_ids[: rows // copies or rows], *args, **kwargs)
            return tuple(y.repeat(copies, 1, 1) if rows >= copies else y for y in found)

        return forward

    with patched((layer, once(layer.forward)) for layer in _ends_in(model, model, ("rotary_emb",))):
        yield


@contextmanager
def first_output_shared(model: nn.Module, block: nn.Module, copies: int, drawn: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context, a block's layers that see its input compute it once for all copies in the batch.

    Args:
        model: an architecture of `FAMILIES`; with another one nothing is changed.
        block: a block whose input is the same for all copies.
        copies: equal parts, one after the other, of the batch.
        drawn: layers that differ between the copies.
    """

    def once(whole: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = whole(x[: len(x) // copies], *args, **kwargs)
            return y.repeat(copies, *[1] * (y.dim() - 1))

        return forward

    apart = {id(module) for module in drawn}
    with patched(
        (layer, once(layer.forward))
        for layer in (getattr(adapted, "base_layer", adapted) for adapted in _ends_in(model, block, SEES_INPUT))
        if not any(id(part) in apart for part in layer.modules())
    ):
        yield


@contextmanager
def last_position(model: nn.Module, block: nn.Module) -> Iterator[None]:
    """Within the context, the last block computes the last position alone, but for the keys and values of all.

    It returns (N, 1, D), or all positions, of which only the last is right.

    Args:
        model: an architecture of `FAMILIES`; with another one nothing is changed.
        block: its last block.
    """
    with patched([(block, _at_last(model, block))] if architecture(model) in ASK_A_CACHE else _alone(model, block)):
        yield


def _alone(model: nn.Module, block: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """Yield a block's layers after attention, with forward functions for the last position, which is added to all."""
    for layer in _ends_in(model, block, AFTER_ATTENTION):
        whole = layer.forward
        yield layer, lambda x, *args, whole=whole, **kwargs: whole(x[:, -1:], *args, **kwargs)


def _at_last(model: nn.Module, block: Any) -> Callable[..., Any]:
    """Return a block's forward function for the last position alone.

    It runs twice: up to where the keys and values of all positions are known, with queries of one head that are 0, and
    with the last position, whose query is asked of them.
    """
    whole, attention = block.forward, block.self_attn
    queries = [attention.q_proj] if architecture(model) in HEADS_APART else []

    def no_query(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x.new_zeros(()).expand(*x.shape[:-1], attention.head_dim)

    def forward(hidden_states: Tensor, attention_mask: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        cache = _KeysAndValues(past_key_values)
        if isinstance(attention_mask, Tensor | None):
            with patched((layer, no_query) for layer in queries), suppress(_Reached):
                whole(hidden_states, attention_mask=attention_mask, past_key_values=cache, **kwargs)
        if cache.found is None:  # a mask that has no last row, as flexible attention's, or a block that asks no cache
            with patched(_alone(model, block)):
                return whole(hidden_states, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs)
        if attention_mask is not None and attention_mask.dim() == 4:  # (N, 1, T, T'); else (N, T'), of keys alone
            attention_mask = attention_mask[:, :, -1:]
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"][:, -1:]
        kwargs["position_embeddings"] = tuple(x[:, -1:] for x in kwargs["position_embeddings"])
        return whole(hidden_states[:, -1:], attention_mask=attention_mask, past_key_values=cache, **kwargs)

    return forward


class _KeysAndValues:
    """Stands for a cache in a block that runs twice: until it hands them over, and with them."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.found: Any = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take keys and values of all positions, and end the pass; or return them."""
        if self.found is None:
            self.found = (keys, values) if self.cache is None else self.cache.update(keys, values, *args, **kwargs)
            raise _Reached
        return self.found


def _ends_in(model: nn.Module, block: nn.Module, ends: tuple[str, ...]) -> list[nn.Module]:
    """Return a block's layers by the ends of their names."""
    if architecture(model) not in FAMILIES:
        return []
    return [layer for name, layer in block.named_modules() if name.endswith(ends)]


def architecture(model: nn.Module) -> str | None:
    """Return what transformers calls the model's type."""
    config: Any = getattr(model, "config", None)
    return getattr(config, "model_type", None)


def acts_from_tokens_on(model: nn.Module) -> bool:
    """Whether an adapter acts from certain tokens on only, which it looks for in what a pass is given."""
    adapters = getattr(model, "peft_config", None) or {}
    return any(getattr(adapter, "alora_invocation_tokens", None) for adapter in adapters.values())


def resumable(model: nn.Module) -> bool:
    """Whether a model can go on at a block from hidden states alone."""
    return architecture(model) in RESUMABLE


def blocks_at(model: nn.Module, path: str) -> nn.ModuleList | None:
    """Return the list of blocks at a path, if there is one."""
    try:
        found = model.get_submodule(path)
    except AttributeError:
        return None
    return found if isinstance(found, nn.ModuleList) else None


def repeated(batch: Mapping[str, Any] | Tensor, copies: int) -> Any:
    """Return a batch that holds every row as often as that, copy after copy.

    Example:
        >>> import torch
        >>> repeated({"input_ids": torch.tensor([[1, 2], [3, 4]])}, 2)["input_ids"].tolist()
        [[1, 2], [3, 4], [1, 2], [3, 4]]
    """
    if isinstance(batch, Mapping):
        return {key: repeated(value, copies) if isinstance(value, Tensor) else value for key, value in batch.items()}
    return batch.repeat(copies, *[1] * (batch.dim() - 1))
