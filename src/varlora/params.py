"""The trainable parameters of a model, by name, and a safe way to put other values into them for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from varlora.errors import DamagedFileError

__all__ = ["check_same_parameters", "copied", "flat", "not_finite", "swapped", "trainable"]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training moves, keyed by name, in the model's order.

    Args:
        model: any module; for a `peft` model these are the adapter's matrices A and B.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> layer.bias.requires_grad_(False).requires_grad
        False
        >>> list(trainable(layer))
        ['weight']
    """
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def copied(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the parameters that training moves, keyed by name, for a posterior to keep.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> copied(layer)["weight"] is layer.weight
        False
    """
    return {name: parameter.detach().clone() for name, parameter in trainable(model).items()}


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """Return the entries of all tensors in a row, on the device of the first; they may lie on several.

    Example:
        >>> flat([torch.tensor([[1, 2], [3, 4]]), torch.tensor(5)])
        tensor([1, 2, 3, 4, 5])
    """
    rows = [tensor.flatten() for tensor in tensors]
    return torch.cat([row.to(rows[0].device) for row in rows])


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of a tensor that holds infinity or NaN, if there is one.

    Example:
        >>> not_finite({"a": torch.zeros(2), "b": torch.tensor([1.0, torch.nan])})
        'b'
    """
    return next((name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()), None)


def check_same_parameters(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor], what: str) -> None:
    """Raise if `values` are not of exactly these parameters.

    Args:
        parameters: the model's trainable parameters by name.
        values: tensors that ought to have the same names and shapes.
        what: what the values are, for the message ("the posterior").

    Raises:
        DamagedFileError: names or shapes differ; the message shows the first difference of each kind.
    """
    problems = []
    if missing := [name for name in parameters if name not in values]:
        problems.append(f"{len(missing)} of the model's parameters are missing in it, e.g. `{missing[0]}`")
    if unknown := [name for name in values if name not in parameters]:
        problems.append(f"{len(unknown)} of its tensors are not in the model, or are frozen there, e.g. `{unknown[0]}`")
    shapes = [name for name in values if name in parameters and values[name].shape != parameters[name].shape]
    if shapes:
        got, want = tuple(values[shapes[0]].shape), tuple(parameters[shapes[0]].shape)
        problems.append(f"`{shapes[0]}` has shape {got} where the model has {want}")
    if problems:
        raise DamagedFileError(
            f"Expected {what} to be of this model, but {'; '.join(problems)}. "
            "Load it with the base model and the LoRA settings that it was trained with."
        )


@contextmanager
def swapped(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context, `model` has `values` in its trainable parameters; after it, its own, bit for bit.

    Storage, identity and type of the parameters stay; values are rounded to the parameter's type. The parameters
    come back also when an exception leaves the context.

    Args:
        model: the model whose parameters are replaced.
        values: tensors by parameter name; names that are left out keep their value.

    Raises:
        DamagedFileError: a name is not a trainable parameter of the model, or a shape differs.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> before = layer.weight.item()
        >>> with swapped(layer, {"weight": torch.tensor([[2.0]])}):
        ...     layer(torch.tensor([3.0])).item()
        6.0
        >>> layer.weight.item() == before
        True
    """
    parameters = trainable(model)
    check_same_parameters({name: parameters[name] for name in values if name in parameters}, values, "the new values")
    kept = {name: parameters[name].detach().clone() for name in values}
    try:
        _copy(parameters, values)
        yield
    finally:
        _copy(parameters, kept)


@torch.no_grad()
def _copy(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)
    torch.clear_autocast_cache()  # in whose context the next pass would else be that of the values before
