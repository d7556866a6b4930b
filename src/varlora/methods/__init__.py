"""Every way to a posterior, by name."""

from __future__ import annotations

from typing import Any

from varlora.methods.adamw import AdamW
from varlora.methods.base import ANY, Comparison, Method, Plan, Prepared, Start, Trained
from varlora.methods.blob import Blob
from varlora.methods.ensemble import Ensemble
from varlora.methods.ivon import Ivon
from varlora.methods.laplace import LaplaceDiag, LaplaceKfac
from varlora.methods.mc_dropout import McDropout
from varlora.methods.pruned import Pruned
from varlora.methods.swa import Swa, Swag
from varlora.methods.temperature import Temperature
from varlora.methods.tfb import Tfb

__all__ = [
    "ANY",
    "METHODS",
    "AdamW",
    "Blob",
    "Comparison",
    "Ensemble",
    "Ivon",
    "LaplaceDiag",
    "LaplaceKfac",
    "McDropout",
    "Method",
    "Plan",
    "Prepared",
    "Pruned",
    "Start",
    "Swa",
    "Swag",
    "Temperature",
    "Tfb",
    "Trained",
]

METHODS: dict[str, type[Any]] = {
    method.name: method
    for method in (
        AdamW,
        Ivon,
        McDropout,
        Swa,
        Swag,
        LaplaceDiag,
        LaplaceKfac,
        Tfb,
        Blob,
        Ensemble,
        Temperature,
        Pruned,
    )
}
"""Name -> class; calling it with settings gives the method."""
