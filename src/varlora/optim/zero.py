"""What one process has of parameters that DeepSpeed's ZeRO-1 or -2 spreads over several.

ZeRO puts this rank's part of a group, one flat tensor in float32, in the place of the group's parameters. It copies
that into the model, and gathers it there from all ranks, after a step only. So what is written between steps, a draw or
the mean, has to be carried over here. Of DeepSpeed this needs no more than what it notes at the model's parameters:
where a parameter's elements lie in this rank's partition (`_hp_mapping`), and which ranks share it (`_dp_group`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .bucket import plain
from .noise import Piece

__all__ = ["Partitions", "partitions_of"]


def partitions_of(given: Sequence[Sequence[Tensor | None]], now: Sequence[Tensor]) -> Partitions | None:
    """Return what DeepSpeed's ZeRO has put in the place of an optimizer's parameters; None where they are still there.

    A draw in tensors that no forward pass sees would be of no use, and gradients would be taken at the mean.

    Args:
        given: the parameters of each group that the optimizer was made with, in order; None for one that is no more.
        now: what it has now.

    Raises:
        RuntimeError: others were put in their place that the model cannot be told of.
    """
    there = [p for group in given for p in group if p is not None]
    emptied = there and not now  # as stage 3 does between its steps
    if not emptied and {id(p) for p in now} <= {id(p) for p in there}:
        return None
    if any(hasattr(p, "_hp_mapping") for p in there):
        return Partitions(given, now)
    all_parameters = bool(there) and all(isinstance(p, nn.Parameter) for p in there)
    replaced = all_parameters and not all(isinstance(p, nn.Parameter) for p in now)
    if replaced or any(hasattr(p, "ds_id") for p in there):
        raise RuntimeError(
            "Expected the model's parameters, but others were put in their place, as DeepSpeed does at stage 3 of "
            "ZeRO, and at stage 0 with weights of 16 bits: a draw would be in these, and gradients be taken at the "
            "mean. Use its stage 1 or 2, DDP, or FSDP2 for large models."
        )
    return None


class _Part(NamedTuple):
    """Neighbouring elements that this rank has of a parameter."""

    flat: int
    """Which of the partitions they are in."""
    at: int
    """Where they start in it."""
    start: int
    """Where they start in the lot."""
    numel: int


@dataclass
class _Lot:
    """Parameters of one type that the same ranks share: what is reduced at once."""

    process_group: Any
    positions: list[int] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)
    parts: list[_Part] = field(default_factory=list)
    numel: int = 0
    buffer: Tensor | None = None

    def together(self, flats: Sequence[Tensor], buffer: Tensor) -> list[Tensor]:
        """Return each parameter's values, of which every rank has those of its partitions, as views of a buffer."""
        buffer.zero_()
        for flat, at, start, numel in self.parts:
            buffer[start : start + numel] = flats[flat][at : at + numel]
        dist.all_reduce(buffer, group=self.process_group)
        sizes = [p.numel() for p in self.parameters]
        return [x.view_as(p) for x, p in zip(buffer.split(sizes), self.parameters)]

    def empty(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return a buffer for all values, of the parameters' type if no other is named."""
        first = self.parameters[0]
        return torch.empty(self.numel, dtype=dtype or first.dtype, device=first.device)


class Partitions:
    """The flat partitions of all groups, and the model's parameters that they stand for.

    Args:
        given: the parameters of each group that the optimizer was made with, in order; None for one that is no more.
        flats: the partition that it now has in their place, for each group.

    Raises:
        RuntimeError: some partitions are not there, or DeepSpeed's notes of where parameters lie are wrong, or those of
            another engine; on all ranks.
    """

    def __init__(self, given: Sequence[Sequence[Tensor | None]], flats: Sequence[Tensor]) -> None:
        self.flats = list(flats)
        self.pieces_of: list[list[Piece]] = [[] for _ in flats]
        lots: dict[Any, _Lot] = {}
        begins: dict[tuple[int, int], int] = {}  # where the memory of each group's parameters begins
        absent = misplaced = False
        numbered = [(number, p) for number, group in enumerate(given) for p in group]
        self.padding_position = len(numbered)
        for position, (number, p) in enumerate(numbered):
            if p is None or not hasattr(p, "_hp_mapping"):  # which DeepSpeed does not train
                continue
            begin = begins.setdefault((number, p.untyped_storage().data_ptr()), p.data_ptr())
            if not p.requires_grad:
                continue
            ranks = p._dp_group  # type: ignore[attr-defined]
            lot = lots.setdefault((id(ranks), p.dtype, p.device), _Lot(ranks))
            flat = None if p._hp_mapping is None else self._which(p._hp_mapping.hp_fragment)
            if flat is not None:
                here, there = p._hp_mapping.hp_fragment_address, p._hp_mapping.lp_fragment_address
                lot.parts.append(_Part(flat, here.start, lot.numel + there.start, here.numel))
                self.pieces_of[flat].append(Piece(here.start, here.numel, position, there.start))
                before = dist.get_rank(ranks) * self.flats[flat].numel() + here.start - there.start
                misplaced |= p.data_ptr() != begin + before * p.element_size()
            elif p._hp_mapping is not None:
                absent = True
            lot.positions.append(position)
            lot.parameters.append(p)
            lot.numel += p.numel()
        self.lots = list(lots.values())
        self.first = self.lots[0].parameters[0] if self.lots else None
        """The first of the model's parameters that are trained."""
        self._check(absent, misplaced)

    @plain
    def _check(self, absent: bool, misplaced: bool) -> None:
        """Raise on all ranks if a partition is absent on one, or a parameter is not where it should be, or nowhere.

        All parameters of a group lie in one memory, the first of them at its beginning, and each rank's partition is
        the part of that memory that has the rank's number. So every element of a parameter is in one partition.
        """
        partial, ones = False, [torch.ones_like(flat) for flat in self.flats]
        for lot in self.lots:
            told = torch.tensor([absent, misplaced], dtype=torch.int32, device=lot.parameters[0].device)
            dist.all_reduce(told, dist.ReduceOp.MAX, group=lot.process_group)
            absent, misplaced = map(bool, told.tolist())
            partial |= any(bool((x != 1).any()) for x in lot.together(ones, lot.empty(torch.float32)))
        if absent:
            raise RuntimeError(
                "Expected the partitions of all groups, but some are not there: DeepSpeed steps with one after the "
                "other, and nothing was drawn before; or another engine has the model. Call `optimizer.train()` before "
                "the forward pass, and give a model to one engine alone."
            )
        if misplaced:
            raise RuntimeError(
                "Expected partitions in the order of the parameters, but DeepSpeed has put these in another one. Set "
                "`round_robin_gradients` in its `zero_optimization` to false."
            )
        if partial:
            raise RuntimeError(
                "Expected each parameter in the partitions, but some are in none, as another engine of DeepSpeed had "
                "the model, or they were frozen when it was made. Destroy that engine, and make a new one."
            )

    def _which(self, x: Tensor) -> int | None:
        """Return which partition a tensor is in."""
        storage = x.untyped_storage().data_ptr()
        return next((i for i, flat in enumerate(self.flats) if flat.untyped_storage().data_ptr() == storage), None)

    def pieces(self, flat: Tensor, lo: int) -> list[Piece]:
        """Return whose elements a partition has, which starts at `lo` of a flat state.

        Padding gets noise too, as that of a parameter that is not there.
        """
        which = self._which(flat)
        assert which is not None
        found, end = [], 0
        for piece in sorted(self.pieces_of[which]):
            if piece.at > end:
                found.append(Piece(lo + end, piece.at - end, self.padding_position, end))
            found.append(piece._replace(at=lo + piece.at))
            end = piece.at + piece.numel
        if end < flat.numel():
            found.append(Piece(lo + end, flat.numel() - end, self.padding_position, end))
        return found

    @plain
    def show(self) -> None:
        """Put what is in the partitions into the model, on all ranks: all of them have to call this."""
        for lot in self.lots:
            lot.buffer = lot.empty() if lot.buffer is None else lot.buffer
            torch._foreach_copy_(lot.parameters, lot.together(self.flats, lot.buffer))
        torch.clear_autocast_cache()  # in whose context the next pass would else be that of the values before

    @plain
    def whole(self, values: Iterable[Tensor]) -> dict[int, Tensor]:
        """Return what all ranks have of values like the partitions, by the parameters' positions: call it on all."""
        flats = list(values)
        found: dict[int, Tensor] = {}
        for lot in self.lots:
            found |= dict(zip(lot.positions, lot.together(flats, lot.empty(flats[0].dtype))))
        return found
