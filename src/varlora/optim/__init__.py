"""Optimizers that stand alone: torch and the standard library are all that they need."""

from varlora.optim.ivon import IVON

__all__ = ["IVON"]
