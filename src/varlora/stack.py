"""S draws made once and run as one batch: the base's weights are applied to S·B rows, the adapter's to B rows each."""

from __future__ import annotations

import itertools
import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from varlora.blocks import (
    acts_from_tokens_on,
    architecture,
    block_of,
    blocks_at,
    first_output_shared,
    last_position,
    patched,
    positions_shared,
    repeated,
    resumable,
    resumed,
    state_at,
)
from varlora.drawing import PLAIN, Draw, Drawing, Forward
from varlora.errors import VarloraError
from varlora.params import check_same_parameters, swapped, trainable
from varlora.prefix import Beginning, begun, continued

__all__ = ["Stack", "out_of_memory", "stacked"]

THREAD_TOKENS = 1024
"""Tokens a pass for each thread of a CPU: more no longer fit into its caches. Not by the memory that is free, on which
the bits would depend."""
FREE_SHARE = 0.7
"""Share of a GPU's free memory that a pass may take."""
TIME_MAJOR = ("xlnet",)
"""Architectures whose layers see (T, B, D)."""


class NotStacked(Exception):
    """The model does not let several draws pass at once."""


class Stack:
    """S draws of a posterior's weights.

    Args:
        draws: each draw's weights by parameter name, D of them that differ; they are used up.
        order: the S draws as numbers of those; left out: each once.
        mean: the posterior's mean by parameter name, for layers that are not drawn.
        how: how they are run.

    Raises:
        VarloraError: the last layers alone are to be drawn, and the weights do not lie in one list of layers.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> stack = Stack([{"weight": torch.tensor([[2.0]])}, {"weight": torch.tensor([[3.0]])}])
        >>> stack.logits(layer, torch.ones(1, 1), lambda model, batch: model(batch)).flatten().tolist()
        [2.0, 3.0]
    """

    def __init__(
        self,
        draws: Sequence[dict[str, Tensor]],
        order: Sequence[int] | None = None,
        mean: Mapping[str, Tensor] | None = None,
        how: Drawing = PLAIN,
    ) -> None:
        self.how = how
        self.order = list(range(len(draws)) if order is None else order)
        names = sorted(draws[0])
        places = {name: block_of(name) for name in names}
        lists = {place[0] for place in places.values() if place}
        numbers = sorted({place[1] for place in places.values() if place})
        self.path = lists.pop() if len(lists) == 1 and all(places.values()) else None
        if how.last_layers and self.path is None:
            raise VarloraError(
                "Expected an adapter within one list of layers to draw the last of them alone, but "
                f"`{next((name for name, place in places.items() if not place), names[0])}` lies outside. "
                "Leave `last_layers` out."
            )
        self.first = 0
        self.below: dict[str, Tensor] = {}
        if self.path is not None:
            drawn = numbers[-how.last_layers :] if how.last_layers else numbers
            self.first = drawn[0]
            if mean is not None:
                self.below = {name: mean[name] for name, place in places.items() if place and place[1] < self.first}
        # name by name, so that little is there twice
        self.weights = {
            name: torch.stack([draw.pop(name) for draw in draws]) for name in names if name not in self.below
        }
        """(D, *shape) by parameter name."""
        self._in_order = self.order == list(range(len(draws)))
        self.passes = 0
        """Rows that were run, each draw counted."""
        self._stackable = how.stacked and (len(draws) > 1 or self.first > 0)  # one draw gains nothing
        self._tokens = how.tokens
        self._model: weakref.ref[nn.Module] | None = None  # whose layers these are
        self._layers: dict[nn.Linear, dict[str, str]] = {}
        self._beginning = Beginning(self.distinct)

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
        if self.how.tolerance is not None and self._in_order:
            return self._until_settled(model, batch, forward, self.how.tolerance)
        found = self._run(model, batch, forward, 0, self.distinct)
        return found if self._in_order else found[self.order]

    def _until_settled(self, model: nn.Module, batch: Any, forward: Forward, tolerance: float) -> Tensor:
        """Return the logits of each draw; of rows that settled early, the draws so far again, each as often."""
        total, paired = self.distinct, self.how.noise == "antithetic"
        stops = self.how.stops(total)
        made = self._run(model, batch, forward, 0, stops[0])
        logits = made.repeat(total // stops[0], 1, 1)
        going = torch.arange(made.shape[1], device=made.device)
        for start, stop in itertools.pairwise(stops):
            going = going[~settled(logits[:start, going], tolerance, paired)]
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
        layers = self._layers_of(model)
        rows, _ = size_of(batch)
        device = next(iter(layers)).weight.device
        blocks = state = like = prefix = None
        if self.path is not None and isinstance(batch, Mapping) and getattr(forward, "last_position_alone", False):
            blocks = blocks_at(model, self.path)
        logits: list[Tensor] = []
        with swapped(model, self.below):
            if blocks is not None and self.first > 0 and resumable(model):
                state, like = state_at(blocks, self.first, lambda: forward(model, batch))
            elif blocks is not None and (parts := self._beginning.divided(model, batch)) is not None:
                prefix, batch = parts
            own, before = rows * size_of(batch)[1], 0 if prefix is None else prefix.shape[1]
            tokens = own if self._beginning.keeps else own + before  # of a draw's pass
            while start < stop:
                room, cache = self._room(device), None  # what the pass before this one went on from is freed
                count = min(stop - start, room // tokens or 1)
                draws, each = count, tokens  # of the pass that runs
                weights = {name: value[start : start + count] for name, value in self.weights.items()}
                try:
                    if prefix is not None:
                        make = partial(self._begun, model, blocks, prefix)
                        if self._beginning.keeps:
                            draws, each = min(self.distinct, room // before or 1), before
                        cache = self._beginning.cache(start, start + count, make, at_once=draws)
                        draws, each = count, tokens
                    with ExitStack() as within:
                        within.enter_context(self._measured(own * count, device))
                        if prefix is not None:
                            within.enter_context(continued(model, cache, rows))
                        if blocks is not None:
                            if state is not None:
                                of_all = state.repeat(count, 1, 1)
                                within.enter_context(resumed(model, blocks, self.first, of_all, like))
                            shares = state is not None or self.first == 0  # else the copies share no input
                            within.enter_context(self._once(model, blocks, count, shares))
                        within.enter_context(stacked(layers, weights, rows, batch))
                        found = forward(model, repeated(batch, count))
                except Exception as error:
                    if not out_of_memory(error):
                        raise
                    if draws > 1:
                        self._tokens = draws * each // 2
                    elif prefix is not None and cache is None and self._beginning.keeps:
                        self._beginning.keep_none()  # made draw by draw, all together were still too much
                        tokens = own + before
                    else:
                        raise
                else:
                    logits.append(found.view(count, rows, -1))
                    start += count
                    self.passes += count * rows
        return torch.cat(logits)

    @contextmanager
    def _once(self, model: nn.Module, blocks: Any, count: int, shares: bool) -> Iterator[None]:
        """Within the context, what is not asked for, or is the same for copies that share their input, is left out."""
        with positions_shared(model, count), last_position(model, blocks[-1]):
            if shares:
                with first_output_shared(model, blocks[self.first], count, self._layers):
                    yield
            else:
                yield

    def _begun(self, model: nn.Module, blocks: Any, first: Tensor, start: int, stop: int) -> Any:
        """Return the keys and values of the tokens that rows begin with, for some draws."""
        weights = {name: value[start:stop] for name, value in self.weights.items()}
        with (
            self._once(model, blocks, stop - start, shares=self.first == 0),
            stacked(self._layers, weights, 1, {"input_ids": first}),
        ):
            return begun(model, first, stop - start)

    def _layers_of(self, model: nn.Module) -> dict[nn.Linear, dict[str, str]]:
        """Return the layers that the weights are of, which are looked up, and compared, once for each model."""
        if self._model is None or self._model() is not model:
            parameters, one = trainable(model), {name: value[0] for name, value in self.weights.items()}
            check_same_parameters({name: parameters[name] for name in one if name in parameters}, one, "the new values")
            self._layers, self._model = owners(model, self.weights), weakref.ref(model)
            self._beginning = Beginning(self.distinct)
        return self._layers

    def _room(self, device: torch.device) -> int:
        """Return the tokens of a pass; on a GPU one draw alone goes first, which shows what a token takes."""
        if self._tokens is None and device.type != "cuda":
            self._tokens = THREAD_TOKENS * torch.get_num_threads()
        return self._tokens or 0

    @contextmanager
    def _measured(self, tokens: int, device: torch.device) -> Iterator[None]:
        """Find out on a GPU how many tokens there is room for, from the memory that the first pass takes.

        It resets the device's peak statistics.
        """
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
def stacked(
    layers: Mapping[nn.Linear, Mapping[str, str]], weights: Mapping[str, Tensor], rows: int, batch: Any
) -> Iterator[None]:
    """Within the context, linear layers have S weights, each for its own rows of the batch; their own are unused.

    Args:
        layers: what `owners` returned.
        weights: (S, *shape) by parameter name.
        rows: rows B of each; the model is given S·B, draw after draw.
        batch: the B rows, for their width.

    Raises:
        NotStacked: a layer was not called, or with something else than those rows.
    """
    draws = len(next(iter(weights.values())))
    width = size_of(batch)[1] if isinstance(batch, Mapping) else None
    called: set[int] = set()

    def of(layer: nn.Linear, names: Mapping[str, str]) -> Any:
        def forward(x: Tensor) -> Tensor:
            if x.dim() < 2 or len(x) != draws * rows:
                raise NotStacked
            if width is not None and (x.dim() < 3 or x.shape[1] not in (1, width)):
                raise NotStacked
            called.add(id(layer))
            flat = x.reshape(draws, -1, x.shape[-1])  # (S·B, ..., in) -> (S, B·..., in)
            dtype = layer.weight.dtype
            weight = weights[names["weight"]].to(x.device, dtype)  # (S, out, in)
            if "bias" in names:
                y = torch.baddbmm(weights[names["bias"]].to(x.device, dtype)[:, None], flat, weight.mT)
            else:
                y = torch.bmm(flat, weight.mT)
            return y.view(*x.shape[:-1], -1)

        return forward

    with patched((layer, of(layer, names)) for layer, names in layers.items()):
        yield
    if len(called) < len(layers):
        raise NotStacked


def owners(model: nn.Module, names: Iterable[str]) -> dict[nn.Linear, dict[str, str]]:
    """Return the linear layers that parameters are of, and by what name each has its weight and its bias.

    Raises:
        NotStacked: a parameter is of something else, or of more than one module.
    """
    found: dict[nn.Linear, dict[str, str]] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        layer = model.get_submodule(path)
        if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
            raise NotStacked
        found.setdefault(layer, {})[leaf] = name
    users = Counter(id(p) for part in model.modules() for p in part._parameters.values() if p is not None)
    for layer, own in found.items():
        if "weight" not in own or (layer.bias is not None and "bias" not in own):
            raise NotStacked
        if any(users[id(parameter)] > 1 for parameter in layer.parameters(recurse=False)):
            raise NotStacked
    return found


def can_stack(model: nn.Module, batch: Any) -> bool:
    """Whether several draws of a model can pass as one batch, as far as can be seen before."""
    if not isinstance(batch, Tensor) and not (isinstance(batch, Mapping) and "input_ids" in batch):
        return False
    if isinstance(model, nn.DataParallel) or architecture(model) in TIME_MAJOR:
        return False  # the one divides the batch by itself, the other turns it around
    if acts_from_tokens_on(model):
        return False  # peft leaves its hooks behind where a pass is given up
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


def settled(logits: Tensor, tolerance: float, paired: bool = False) -> Tensor:
    """Return whether more draws would change neither a row's answer nor its probabilities, (B,) bool.

    Few draws often lie closer together than all would, and to stop just there favours what most draws say. So they are
    judged as if their logits, taken for Gaussian, were as far apart as they may be: by the upper 95 % bound of
    their standard deviation, which is 3.0 times what is seen of 4 draws, and 1.4 times of 16.

    Args:
        logits: (n, B, C), of at least 4 draws or pairs; -inf for an answer that a row does not have.
        tolerance: standard error that every averaged probability is to have at the most; the first answer's lead over
            the second has to be more than two of its own.
        paired: every second draw depends on the one before it, so that pairs are what is independent.

    References:
        Wilson and Hilferty 1931 (the quantile of χ²).
    """
    logits, freedom = logits.double(), len(logits) // (1 + paired) - 1
    quantile = (1 - 2 / (9 * freedom) - 1.645 * math.sqrt(2 / (9 * freedom))) ** 3  # of χ², over its mean
    center = logits.mean(0)
    apart = torch.where(logits == -math.inf, logits, center + (logits - center) / math.sqrt(quantile))
    probs = apart.softmax(-1)
    if paired:
        probs = probs.unflatten(0, (-1, 2)).mean(1)
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
