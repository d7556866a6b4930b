"""IVON left to itself trains on other architectures, layers, ranks, batches and labels: no divergence, no tuning."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from varlora.demo.run import one_thread
from varlora.fit import _chance
from varlora.methods import Ivon
from varlora.model import LoRA, load_model
from varlora.prompt import Encoded

STEPS = 60


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def llama(folder: Path) -> Path:
    return helpers.base_folder()


def gpt2(folder: Path) -> Path:
    config = GPT2Config(vocab_size=helpers.VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    return saved(GPT2LMHeadModel(config), folder)


def neox(folder: Path) -> Path:
    config = GPTNeoXConfig(
        vocab_size=helpers.VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return saved(GPTNeoXForCausalLM(config), folder)


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(helpers.base_folder()).save_pretrained(folder)
    return folder


def learnable(count: int = 96) -> list[Encoded]:
    """Rows whose answer is told by a token that is in the prompt."""
    source, rows = random.Random(0), []
    for i in range(count):
        label = source.randrange(2)
        ids = [source.randrange(10, 40) for _ in range(source.randint(3, 9))]
        ids[source.randrange(len(ids))] = 5 + label
        rows.append(Encoded(f"row {i}", tuple(ids), helpers.ANSWERS[:2], label, False))
    return rows


def imbalanced() -> list[Encoded]:
    rows = learnable(300)
    return [row for row in rows if row.label == 0][:90] + [row for row in rows if row.label == 1][:10]


def mislabelled() -> list[Encoded]:
    """One in five has the other answer."""
    rows = learnable()
    return [replace(row, label=1 - (row.label or 0)) if i % 5 == 0 else row for i, row in enumerate(rows)]


def train(
    folder: Path,
    base: Callable[[Path], Path] = llama,
    rows: list[Encoded] | None = None,
    batch_size: int = 8,
    rank: int = 8,
    targets: tuple[str, ...] | None = None,
    steps: int = STEPS,
) -> list[dict[str, Any]]:
    """Train with nothing said but the model and the rows; return what was logged."""
    torch.manual_seed(0)
    model = load_model(str(base(folder / "base")), lora=LoRA(rank=rank, alpha=2 * rank, targets=targets), device="cpu")[
        0
    ]
    said: list[str] = []
    helpers.run_fit(
        model, Ivon(), folder, rows or learnable(), steps=steps, batch_size=batch_size, checkpoint_every=steps,
        training_arguments={"logging_steps": 10}, warn=said.append,
    )  # fmt: skip
    assert not helpers.about(said, "not finite")
    tuned = json.loads((folder / "tuned.json").read_text())
    assert 1e-4 < tuned["found"]["sigma"] < 1
    return helpers.logged(folder)


def check(lines: list[dict[str, Any]], rows: list[Encoded]) -> None:
    """Nothing diverges: in the second half the loss under noise is about that of chance at the most."""
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines)
    late = lines[len(lines) // 2 :]
    assert sum(line["loss"] for line in late) / len(late) < 1.3 * _chance(rows)
    assert 0.8 < lines[-1]["hessian_over_first"] < 1.25


@pytest.mark.parametrize("base", [llama, gpt2, neox], ids=lambda base: base.__name__)
def test_other_architectures(base: Callable[[Path], Path], tmp_path: Path) -> None:
    check(train(tmp_path, base), learnable())


@pytest.mark.parametrize("base", [gpt2, neox], ids=lambda base: base.__name__)
def test_a_random_base_learns(base: Callable[[Path], Path], tmp_path: Path) -> None:
    """Its answers change so little under any noise that no noise reaches the bound."""
    lines = train(tmp_path, base, steps=300)
    assert lines[-1]["loss_at_mean"] < 0.8 * _chance(learnable())


def test_all_linear_layers(tmp_path: Path) -> None:
    check(train(tmp_path, targets="all-linear"), learnable())


@pytest.mark.parametrize("rank", [1, 4, 16, 64])
def test_ranks(rank: int, tmp_path: Path) -> None:
    check(train(tmp_path, rank=rank), learnable())


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_batches(batch_size: int, tmp_path: Path) -> None:
    steps = STEPS if batch_size > 1 else 2 * STEPS  # the loss of fewer single rows says little
    check(train(tmp_path, batch_size=batch_size, steps=steps), learnable())


@pytest.mark.parametrize("rows", [imbalanced, mislabelled], ids=lambda rows: rows.__name__)
def test_labels(rows: Callable[[], list[Encoded]], tmp_path: Path) -> None:
    check(train(tmp_path, rows=rows()), rows())
