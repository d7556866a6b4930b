"""Optimizers that stand alone: torch and the standard library are all that they need."""

from .ivon import IVON

__all__ = ["IVON"]
