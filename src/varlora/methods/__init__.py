"""Every way to a posterior, by name."""

from __future__ import annotations

from collections.abc import Callable

from varlora.methods.adamw import AdamW
from varlora.methods.base import Method
from varlora.methods.ivon import Ivon

__all__ = ["METHODS", "AdamW", "Ivon", "Method"]

METHODS: dict[str, Callable[..., Method]] = {"adamw": AdamW, "ivon": Ivon}
"""Name -> class; calling it with settings gives the method."""
