"""S draws made once and run as one batch: the base's weights are applied to S·B rows, the adapter's to B rows each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from varlora.blocks import (
    block_of,
    blocks_at,
    first_output_shared,
    last_position,
    patched,
    repeated,
    resumed,
    state_at,
)
from varlora.drawing import PLAIN, Draw, Drawing, Forward
from varlora.params import check_same_parameters, swapped, trainable

__all__ = ["Stack", "stacked"]

THREAD_TOKENS = 1024
"""Tokens a pass for each thread of a CPU: more no longer fit into its caches. Not by the memory that is free, on which
the bits would depend."""
FREE_SHARE = 0.7
"""Share of a GPU's free memory that a pass may take."""
LEAST_DRAWS = 4
"""Draws before a row may be called settled."""


class NotStacked(Exception):
    """The model does not let several draws pass at once."""


class Stack:
    """S draws of a posterior's weights.

    Args:
        draws: each draw's weights by parameter name, D of them that differ.
        order: the S draws as numbers of those; left out: each once.
        mean: the posterior's mean by parameter name, for layers that are not drawn.
        how: how they are run.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> stack = Stack([{"weight": torch.tensor([[2.0]])}, {"weight": torch.tensor([[3.0]])}])
        >>> stack.logits(layer, torch.ones(1, 1), lambda model, batch: model(batch)).flatten().tolist()
        [2.0, 3.0]
    """

    def __init__(
        self,
        draws: Sequence[Mapping[str, Tensor]],
        order: Sequence[int] | None = None,
        mean: Mapping[str, Tensor] | None = None,
        how: Drawing = PLAIN,
    ) -> None:
        self.how = how
        self.order = list(range(len(draws)) if order is None else order)
        names = draws[0].keys()
        places = {name: block_of(name) for name in names}
        lists = {place[0] for place in places.values() if place}
        numbers = sorted({place[1] for place in places.values() if place})
        self.path = lists.pop() if len(lists) == 1 and all(places.values()) else None
        self.first = 0
        self.below: dict[str, Tensor] = {}
        if self.path is not None:
            drawn = numbers[-how.last_layers :] if how.last_layers else numbers
            self.first = drawn[0]
            if mean is not None:
                self.below = {name: mean[name] for name, place in places.items() if place and place[1] < self.first}
        self.weights = {
            name: torch.stack([draw[name] for draw in draws]) for name in sorted(names) if name not in self.below
        }
        """(D, *shape) by parameter name."""
        self.passes = 0
        """Rows that were run, each draw counted."""
        self._stackable = how.stacked
        self._tokens = how.tokens

    def __len__(self) -> int:
        return len(self.order)

    @property
    def distinct(self) -> int:
        """Number of draws that differ."""
        return len(next(iter(self.weights.values())))

    def draws(self) -> list[dict[str, Tensor]]:
        """Return the weights of each draw that differs, by parameter name."""
        return [
            {**self.below, **{name: value[index] for name, value in self.weights.items()}}
            for index in range(self.distinct)
        ]

    def models(self) -> list[Draw]:
        """Return the S draws."""
        draws = self.draws()
        return [Draw(draws[index]) for index in self.order]

    def logits(self, model: nn.Module, batch: Any, forward: Forward) -> Tensor:
        """Return the class logits of each draw, (S, B, C).

        Args:
            model: the model whose weights were drawn; afterwards it is bit for bit what it was.
            batch: what `forward` takes: a tensor, or tensors by name, with the rows as their first dimension.
            forward: `forward(model, batch) -> (B, C)`.
        """
        if self.how.tolerance is not None and self.order == list(range(self.distinct)):
            return self._until_settled(model, batch, forward, self.how.tolerance)
        found = self._run(model, batch, forward, 0, self.distinct)
        return found if self.order == list(range(len(found))) else found[self.order]

    def _until_settled(self, model: nn.Module, batch: Any, forward: Forward, tolerance: float) -> Tensor:
        """Return the logits of each draw; of rows that settled early, the draws so far again, each as often."""
        total = self.distinct
        stops = [n for n in range(LEAST_DRAWS, total) if total % n == 0] + [total]
        made = self._run(model, batch, forward, 0, stops[0])
        logits = made.repeat(-(-total // stops[0]), 1, 1)[:total]
        going = torch.arange(made.shape[1], device=made.device)
        for start, stop in itertools.pairwise(stops):
            going = going[~settled(logits[:start, going], tolerance)]
            if not len(going):
                break
            logits[start:stop, going] = self._run(model, rows_of(batch, going), forward, start, stop)
            logits[stop:, going] = logits[:stop, going].repeat(total // stop - 1, 1, 1)
        return logits

    def _run(self, model: nn.Module, batch: Any, forward: Forward, start: int, stop: int) -> Tensor:
        """Return the logits of distinct draws `start` to `stop`, (stop - start, B, C)."""
        if self._stackable and can_stack(model, batch):
            try:
                return self._chunks(model, batch, forward, start, stop)
            except NotStacked:
                self._stackable = False
        logits = []
        for weights in self.draws()[start:stop]:
            with swapped(model, weights):
                logits.append(forward(model, batch))
        self.passes += (stop - start) * len(logits[0])
        return torch.stack(logits)

    def _chunks(self, model: nn.Module, batch: Any, forward: Forward, start: int, stop: int) -> Tensor:
        """Run as many draws a pass as there is room for; where memory runs out, half as many from then on."""
        parameters, first = trainable(model), {name: value[0] for name, value in self.weights.items()}
        check_same_parameters({name: parameters[name] for name in first if name in parameters}, first, "the new values")
        rows, width = size_of(batch)
        device = next(iter(parameters.values())).device
        blocks = blocks_at(model, self.path) if self.path is not None and isinstance(batch, Mapping) else None
        state = like = None
        if blocks is not None and self.first > 0:
            with swapped(model, self.below):
                state, like = state_at(blocks, self.first, lambda: forward(model, batch))
        logits: list[Tensor] = []
        while start < stop:
            count = min(stop - start, self._room(device) // (rows * width) or 1)
            weights = {name: value[start : start + count] for name, value in self.weights.items()}
            try:
                with ExitStack() as within:
                    if blocks is not None:
                        if state is not None:
                            within.enter_context(resumed(blocks, self.first, state.repeat(count, 1, 1), like))
                        within.enter_context(last_position(model, blocks[-1]))
                        drawn = owners(model, weights)
                        within.enter_context(first_output_shared(model, blocks[self.first], count, drawn))
                    within.enter_context(self._measured(rows * width * count, device))
                    within.enter_context(stacked(model, weights, rows))
                    found = forward(model, repeated(batch, count))
            except Exception as error:
                if count == 1 or not out_of_memory(error):
                    raise
                self._tokens = rows * width * (count // 2)
            else:
                logits.append(found.view(count, rows, -1))
                start += count
                self.passes += count * rows
        return torch.cat(logits)

    def _room(self, device: torch.device) -> int:
        """Return the tokens of a pass; on a GPU one draw alone goes first, which shows what a token takes."""
        if self._tokens is None and device.type == "cpu":
            self._tokens = THREAD_TOKENS * torch.get_num_threads()
        return self._tokens or 0

    @contextmanager
    def _measured(self, tokens: int, device: torch.device) -> Iterator[None]:
        """Find out on a GPU how many tokens there is room for, from the memory that the first pass takes."""
        if self._tokens is not None:
            yield
            return
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield
        a_token = max(torch.cuda.max_memory_allocated(device) - before, 1) / tokens
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        self._tokens = max(1, int(FREE_SHARE * (torch.cuda.mem_get_info(device)[0] + unused) / a_token))


@contextmanager
def stacked(model: nn.Module, weights: Mapping[str, Tensor], rows: int) -> Iterator[None]:
    """Within the context, the linear layers of some weights have S of them, each for its own rows of the batch.

    Args:
        model: the model; its own weights stay where they are, unused.
        weights: (S, *shape) by parameter name, weights and biases of linear layers.
        rows: rows B of each; the batch holds S·B, draw after draw.

    Raises:
        NotStacked: a layer was not called, or with something else than S·B rows.
    """
    draws = len(next(iter(weights.values())))
    called: set[int] = set()

    def of(layer: nn.Linear, own: Mapping[str, Tensor]) -> Any:
        def forward(x: Tensor) -> Tensor:
            if x.dim() < 2 or len(x) != draws * rows:
                raise NotStacked
            called.add(id(layer))
            flat = x.reshape(draws, -1, x.shape[-1])  # (S·B, ..., in) -> (S, B·..., in)
            dtype = layer.weight.dtype
            weight = own["weight"].to(x.device, dtype)  # (S, out, in)
            bias = own.get("bias")
            if bias is None:
                y = torch.bmm(flat, weight.mT)
            else:
                y = torch.baddbmm(bias.to(x.device, dtype)[:, None], flat, weight.mT)
            return y.view(*x.shape[:-1], -1)

        return forward

    layers = owners(model, weights)
    with patched((layer, of(layer, own)) for layer, own in layers.items()):
        yield
    if len(called) < len(layers):
        raise NotStacked


def owners(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[nn.Linear, dict[str, Tensor]]:
    """Return the linear layers that the weights are of, and what each has of them.

    Raises:
        NotStacked: a weight is of something else.
    """
    found: dict[nn.Linear, dict[str, Tensor]] = {}
    for name, value in weights.items():
        path, _, leaf = name.rpartition(".")
        layer = model.get_submodule(path)
        if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
            raise NotStacked
        found.setdefault(layer, {})[leaf] = value
    for layer, own in found.items():
        if "weight" not in own or (layer.bias is not None and "bias" not in own):
            raise NotStacked
    return found


def can_stack(model: nn.Module, batch: Any) -> bool:
    """Whether several draws of a model can pass as one batch, as far as can be seen before."""
    if not isinstance(batch, Tensor) and not (isinstance(batch, Mapping) and "input_ids" in batch):
        return False
    if isinstance(model, nn.DataParallel):  # it divides the batch by itself
        return False
    # compiled code would be compiled anew for each pass
    return not any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in model.modules())


def size_of(batch: Any) -> tuple[int, int]:
    """Return a batch's rows and the tokens of each, padding included."""
    first = batch["input_ids"] if isinstance(batch, Mapping) else batch
    return len(first), first.shape[1] if first.dim() > 1 else 1


def rows_of(batch: Any, index: Tensor) -> Any:
    """Return some rows of a batch."""
    if isinstance(batch, Mapping):
        return {k: value[index.to(value.device)] if isinstance(value, Tensor) else value for k, value in batch.items()}
    return batch[index.to(batch.device)]


def settled(logits: Tensor, tolerance: float) -> Tensor:
    """Return whether more draws would change neither a row's answer nor its probabilities, (B,) bool.

    Args:
        logits: (n, B, C), n >= 2.
        tolerance: standard error that every averaged probability is to have at the most; the first answer's lead over
            the second has to be more than two of its own.
    """
    probs = logits.double().softmax(-1)
    root = math.sqrt(len(probs))
    close = (probs.std(0) / root).amax(-1) <= tolerance
    if probs.shape[-1] < 2:
        return close
    first, second = probs.mean(0).topk(2).indices.unbind(-1)  # (B,)
    places = torch.stack([first, second], -1).expand(len(probs), -1, -1)
    of_first, of_second = probs.gather(-1, places).unbind(-1)  # (n, B)
    lead = of_first - of_second
    return close & (lead.mean(0) > 2 * lead.std(0) / root)


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on a GPU or a CPU."""
    told = isinstance(error, RuntimeError) and "allocate memory" in str(error)  # torch on a CPU
    return told or isinstance(error, torch.OutOfMemoryError | MemoryError)
