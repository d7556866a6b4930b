"""Variational LoRA: fine-tune language models and keep a posterior over the adapter."""

__version__ = "0.1.0"
