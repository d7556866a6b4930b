"""What there is to know of a LoRA adapter's layers, without loading PEFT: their matrices, dropout and first values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from varlora.errors import VarloraError
from varlora.params import trainable

__all__ = ["check_no_dora", "dropout_rates", "lora_pairs", "reset_adapter", "seeded"]

AT_RANDOM = (True, False, "gaussian", "orthogonal")
"""What `init_lora_weights` may be that leaves the base as it is."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """PEFT draws A on the CPU, so the CPU's generator is the one to seed: the bits do not depend on the device."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def reset_adapter(model: Any, seed: int) -> None:
    """Start the adapter anew: the bits that `load_model` gives it with this seed.

    Args:
        model: a `peft` model with one LoRA adapter.
        seed: of the adapter's random A.

    Raises:
        VarloraError: the adapter has more than A and B, which would stay as they are, or its start changed the base.
    """
    try:
        lora_pairs(trainable(model))
    except VarloraError as error:
        raise VarloraError(f"{error} An ensemble begins with a new adapter for each member, and could not.") from None
    for config in model.peft_config.values():
        if config.init_lora_weights not in AT_RANDOM:
            raise VarloraError(
                "Expected an adapter whose start leaves the base as it is, so that it can start anew, but got one of "
                f"`init_lora_weights={config.init_lora_weights!r}`. Leave that out of its `LoraConfig`."
            )
    with seeded(seed), torch.no_grad():
        for layer in model.modules():  # a layer of PEFT's
            if hasattr(layer, "lora_A"):
                for name in layer.lora_A:
                    a: Any = layer.lora_A[name]
                    b: Any = layer.lora_B[name]
                    base: Any = layer.get_base_layer()
                    # as PEFT does: both layers draw when they are made, and A again; in the base's type, if it has one
                    fresh = nn.Linear(a.in_features, a.out_features, bias=False)
                    nn.Linear(b.in_features, b.out_features, bias=False)
                    nn.init.kaiming_uniform_(fresh.weight, a=math.sqrt(5))
                    dtype = base.weight.dtype
                    a.weight.copy_(fresh.weight.to(dtype) if dtype.is_floating_point else fresh.weight)
                    b.weight.zero_()


def dropout_rates(model: nn.Module) -> dict[str, float]:
    """Return the rate at which the inputs of each adapter's A are dropped while training, by the name of its weight."""
    rates = {}
    for path, layer in model.named_modules():
        if hasattr(layer, "lora_dropout"):
            dropouts: Any = layer.lora_dropout
            for name, dropout in dropouts.items():
                if name not in layer.lora_A:  # of embeddings, which have no dropout
                    continue
                rates[f"{path}.lora_A.{name}.weight"] = getattr(dropout, "p", 0.0)
    return rates


def check_no_dora(model: nn.Module) -> None:
    """Raise if the adapter has DoRA's magnitudes."""
    if dora := next((name for name in trainable(model) if ".lora_magnitude_vector." in name), None):
        raise VarloraError(
            f"Expected LoRA without DoRA for this method, but the adapter has `{dora}`. Leave `use_dora` out of its "
            "`LoraConfig`, or take another method."
        )


def lora_pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return the names of the weights A and B of each adapted layer.

    Raises:
        VarloraError: a name is neither's: the adapter has more than LoRA's two matrices.

    Example:
        >>> lora_pairs(["q.lora_A.default.weight", "q.lora_B.default.weight"])
        [('q.lora_A.default.weight', 'q.lora_B.default.weight')]
    """
    known = list(names)
    pairs = [(a, a.replace(".lora_A.", ".lora_B.")) for a in known if ".lora_A." in a]
    unknown = set(known) - {name for pair in pairs for name in pair}
    if unknown or not pairs or any(b not in known for _, b in pairs):
        example = min(unknown, default="nothing")
        raise VarloraError(f"Expected an adapter of LoRA's matrices A and B alone, but it has `{example}`.")
    return pairs
