"""Variational LoRA: fine-tune language models and keep a posterior over the adapter.

`from varlora import IVON` needs torch alone; what works on language models is imported at its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from varlora.optim.ivon import IVON
from varlora.posterior import DiagonalGaussian, Mixture, Point, Posterior

if TYPE_CHECKING:
    from varlora.checkpoint import load_posterior, save_adapter
    from varlora.config import Settings
    from varlora.evaluation import evaluate
    from varlora.hub import from_pretrained, push_to_hub
    from varlora.loading import load
    from varlora.methods import METHODS
    from varlora.model import LoRA, class_logits, load_model
    from varlora.report import build_report
    from varlora.tasks import TASKS, get_task, load_rows
    from varlora.training import train

__version__ = "0.1.0"

__all__ = [
    "IVON",
    "METHODS",
    "TASKS",
    "DiagonalGaussian",
    "LoRA",
    "Mixture",
    "Point",
    "Posterior",
    "Settings",
    "build_report",
    "class_logits",
    "evaluate",
    "from_pretrained",
    "get_task",
    "load",
    "load_model",
    "load_posterior",
    "load_rows",
    "push_to_hub",
    "save_adapter",
    "train",
]

_HOMES = {
    "checkpoint": ("load_posterior", "save_adapter"),
    "config": ("Settings",),
    "evaluation": ("evaluate",),
    "hub": ("from_pretrained", "push_to_hub"),
    "loading": ("load",),
    "methods": ("METHODS",),
    "model": ("LoRA", "class_logits", "load_model"),
    "report": ("build_report",),
    "tasks": ("TASKS", "get_task", "load_rows"),
    "training": ("train",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"varlora.{module}"), name)
    raise AttributeError(f"module 'varlora' has no attribute {name!r}")
