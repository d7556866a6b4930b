"""A tiny language model and a few rows, for tests of what runs on models: fitting takes a fraction of a second."""

from __future__ import annotations

import atexit
import functools
import gc
import json
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from varlora.checkpoint import load_adapter, load_posterior
from varlora.demo.run import one_thread
from varlora.fit import fit
from varlora.methods import Method, Plan
from varlora.model import LoRA, class_logits, load_model
from varlora.params import trainable
from varlora.predict import predict
from varlora.predictions import Predictions
from varlora.prompt import Encoded

gc.freeze()  # accelerate collects garbage at each start of training, and the imports leave a million objects to look at

VOCABULARY = 48
ANSWERS = (40, 41, 42, 43, 44)


@functools.cache
def base_folder() -> Path:
    """Return a folder with a random Llama of two layers and its tokenizer, the same in every process."""
    folder = Path(tempfile.mkdtemp(prefix="varlora-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    save_base(folder)
    return folder


def save_base(folder: Path, **changes: Any) -> Path:
    """Save the tiny model, or one that differs from it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
        }
        LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def tiny_model(
    dropout: float = 0.0,
    dtype: Any = "float32",
    adapter: Any = "float32",
    quantization: Any = None,
    rank: int = 4,
    device: str = "cpu",
) -> Any:
    """Return the tiny model with a fresh adapter, the same bits at every call."""
    lora = LoRA(rank=rank, alpha=2 * rank, dropout=dropout, dtype=adapter)
    return load_model(base_folder(), dtype=dtype, quantization=quantization, lora=lora, device=device)[0]


def make_rows(count: int = 12, seed: int = 0, labelled: bool = True) -> list[Encoded]:
    """Return rows of 3 to 9 tokens and two to five answers."""
    source = random.Random(seed)
    rows = []
    for i in range(count):
        answers = ANSWERS[: 2 + i % 4]
        ids = tuple(source.randrange(3, 40) for _ in range(source.randint(3, 9)))
        rows.append(Encoded(f"row {i}", ids, answers, source.randrange(len(answers)) if labelled else None, False))
    return rows


def run_fit(model: nn.Module, method: Method, run_dir: Path, rows: Sequence[Encoded] | None = None, **settings: Any):
    """Fit with small settings, each of which can be replaced."""
    run_dir.mkdir(parents=True, exist_ok=True)
    defaults: dict[str, Any] = {
        "steps": 6,
        "batch_size": 4,
        "checkpoint_every": 2,
        "calibration": make_rows(8, seed=2),
        "warn": lambda words: None,
    }
    return fit(model, method, rows or make_rows(), run_dir, pad_token_id=0, **{**defaults, **settings})


def run_predict(
    model: nn.Module, posterior: Any, rows: Sequence[Encoded] | None = None, **settings: Any
) -> Predictions:
    """Predict a few rows that training did not see."""
    return predict(model, posterior, rows or make_rows(7, seed=1), pad_token_id=0, **{"samples": 3, **settings})


def reloaded(run_dir: Path, **settings: Any) -> tuple[Any, Any]:
    """Return a new model with the adapter of a run, and its posterior."""
    model = tiny_model(**settings)
    posterior = load_posterior(model, run_dir / "adapter")
    load_adapter(model, run_dir / "adapter")
    return model, posterior


def logged(run_dir: Path) -> list[dict[str, Any]]:
    """Return what was logged at each step, without the times; the members of an ensemble one after the other."""
    files = sorted(run_dir.rglob("training.jsonl"))
    lines = [line for file in files for line in file.read_text().splitlines()]
    return [line for line in map(json.loads, lines) if "loss" in line]


def outcome(run_dir: Path) -> dict[str, Any]:
    """Return the bits that a run ends in."""
    files = {
        name: (run_dir / "adapter" / name).read_bytes()
        for name in ("adapter_model.safetensors", "posterior.safetensors")
    }
    return {**files, "log": logged(run_dir)}


@contextmanager
def trainers_afresh() -> Iterator[None]:
    """Inside, trainers find no state of accelerate's that an earlier one left, and train on one thread."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with one_thread():
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the trainable parameters."""
    return {name: p.detach().clone() for name, p in trainable(model).items()}


def same(one: Any, other: Any) -> bool:
    """Whether two mappings of tensors have the same names and bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def forward(model: nn.Module, batch: Any) -> Tensor:
    """Class logits without a graph."""
    with torch.no_grad():
        return class_logits(model, batch)


def seeded(seed: int = 0) -> torch.Generator:
    """Return a generator with a seed."""
    return torch.Generator().manual_seed(seed)


def plan(**changes: Any) -> Plan:
    """Return the plan of a short run without dropout or held-out rows, or one that differs from it."""
    return Plan(**{"steps": 10, "accumulation": 1, "dropout": 0.0, "calibration": False, **changes})


def first_rows(shared: Path, folder: Path, rows: int) -> Path:
    """Copy the first rows of each file of real data."""
    for path in (*(shared / "data").rglob("*.jsonl"), *(shared / "data").rglob("*.tsv")):
        target = folder / path.relative_to(shared / "data")
        target.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as file:
            target.write_bytes(b"".join(line for _, line in zip(range(rows), file)))
    return folder


def about(said: Sequence[str], what: str) -> list[str]:
    """Return what was said of something."""
    return [words for words in said if what in words]
