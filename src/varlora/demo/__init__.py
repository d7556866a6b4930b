"""The demo, and the small pretrained base with tasks that comes with the package."""

from __future__ import annotations

from varlora.demo.base import TASKS, Demo, load
from varlora.demo.run import run_demo

__all__ = ["TASKS", "Demo", "load", "run_demo"]
