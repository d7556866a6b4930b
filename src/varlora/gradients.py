"""Each row's gradients of its class logits, from what goes into and comes out of the linear layers that train.

The gradient of a function of row b with respect to a linear layer's weights W (out, in) is `Σₜ g_bt a_btᵀ`, with a the
layer's inputs and g the gradient with respect to its outputs at position t. So one forward pass and a backward pass for
each class give every row's gradients, and nothing of the size of the vocabulary appears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from varlora.errors import VarloraError
from varlora.params import trainable

__all__ = ["Pass", "one_pass", "trained_layers"]


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass, ready for backward passes."""

    logits: Tensor
    """(B, C), with the graph."""
    inputs: dict[str, Tensor]
    """a, (B, T, in) float32, by the name of the layer's weight."""
    outputs: dict[str, Tensor]
    """(B, T, out), with the graph."""

    def backward(self, cotangent: Tensor) -> dict[str, Tensor]:
        """Return the gradients of `Σ_c cotangent_bc logits_bc` with respect to the layers' outputs.

        Args:
            cotangent: (B, C); entries of answers that a row does not have do not matter.

        Returns:
            g, (B, T, out) float32, by the name of the layer's weight.
        """
        # an answer that a row lacks has the logit -inf: no gradient, and 0 * -inf must not appear
        present = self.logits.isfinite()
        with torch.enable_grad():
            total = self.logits[present] @ cotangent[present]
        gradients = torch.autograd.grad(total, list(self.outputs.values()), retain_graph=True, allow_unused=True)
        return {
            name: _rows(torch.zeros_like(output) if g is None else g)
            for (name, output), g in zip(self.outputs.items(), gradients)
        }

    def weight_gradients(self, cotangent: Tensor) -> dict[str, Tensor]:
        """Return each row's gradients with respect to the weights, (B, out, in) float32, by name."""
        return {name: g.mT @ self.inputs[name] for name, g in self.backward(cotangent).items()}

    def jacobian(self) -> dict[str, Tensor]:
        """Return each row's gradient of each class logit with respect to the weights, (B, C, out, in), by name."""
        unit = torch.eye(self.logits.shape[1], device=self.logits.device)
        classes = [self.weight_gradients(one.expand_as(self.logits)) for one in unit]
        return {name: torch.stack([of_class[name] for of_class in classes], 1) for name in self.inputs}


@contextmanager
def one_pass(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Tensor]) -> Iterator[Pass]:
    """Run `forward` with the linear layers that train watched; the graph lives as long as the context.

    Args:
        model: its parameters that require a gradient are weights of `nn.Linear` layers without other such parameters.
        batch: what `forward` takes; rows must not depend on each other.
        forward: `forward(model, batch) -> (B, C)`, differentiable.

    Raises:
        VarloraError: a parameter that trains is not the weight of a linear layer, or a layer is not used exactly once.

    Example:
        >>> layer = nn.Linear(2, 3, bias=False)
        >>> x = torch.tensor([[[1.0, 2.0]]])  # (B, T, in)
        >>> with one_pass(layer, x, lambda model, batch: model(batch)[:, -1]) as found:
        ...     found.jacobian()["weight"][0, 1].tolist()
        [[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]]
    """
    names = trained_layers(model)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def watch(layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        name = names[layer]
        if name in outputs:
            raise VarloraError(f"Expected each layer to be used once in a forward pass, but `{name}` is used again.")
        inputs[name], outputs[name] = _rows(arguments[0].detach()), output

    hooks = [layer.register_forward_hook(watch) for layer in names]
    try:
        with torch.enable_grad():
            logits = forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if missing := [name for name in names.values() if name not in outputs]:
        raise VarloraError(f"Expected each layer to be used once in a forward pass, but `{missing[0]}` is not.")
    yield Pass(
        logits, {name: inputs[name] for name in names.values()}, {name: outputs[name] for name in names.values()}
    )


def _rows(values: Tensor) -> Tensor:
    """Return (B, ..., d) as (B, T, d) float32."""
    return values.float().reshape(len(values), -1, values.shape[-1])


def trained_layers(model: nn.Module) -> dict[nn.Module, str]:
    """Return the layers that train, and the names of their weights.

    Raises:
        VarloraError: a parameter that trains is not the weight of a linear layer.
    """
    names: dict[nn.Module, str] = {}
    for name in trainable(model):
        path, _, leaf = name.rpartition(".")
        layer = model.get_submodule(path)
        if not isinstance(layer, nn.Linear) or leaf != "weight":
            raise VarloraError(
                f"Expected parameters that are weights of linear layers, as LoRA's are, but `{name}` is not. "
                "Curvature is computed for those alone."
            )
        names[layer] = name
    return names
