"""Draws run as one batch: the loop's logits, whatever the architecture, the base's type and the posterior."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import Mock

import helpers
import pytest
import scipy.stats
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from varlora import blocks, prefix, stack
from varlora.data import collate
from varlora.demo.run import one_thread
from varlora.drawing import PLAIN, Drawing
from varlora.errors import ConfigError, VarloraError
from varlora.model import class_logits
from varlora.params import copied, swapped, trainable
from varlora.posterior import (
    DiagonalGaussian,
    Dropout,
    KroneckerGaussian,
    Linearised,
    LowRankGaussian,
    Mixture,
    Point,
    Tempered,
)
from varlora.predict import predict

ROWS = helpers.make_rows(5, seed=3)  # of several lengths, so that there is padding
BATCH = collate(ROWS, 0)
START = tuple(range(5, 17))
BEGUN = collate([dataclasses.replace(row, input_ids=START + row.input_ids) for row in ROWS], 0)
"""The same rows after an instruction."""
LOOP = Drawing(stacked=False)
S = 6


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def model() -> Any:
    return helpers.tiny_model(dropout=0.1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_like(model: nn.Module, scale: float, seed: int) -> dict[str, Tensor]:
    source = seeded(seed)
    return {name: scale * torch.randn(p.shape, generator=source) for name, p in copied(model).items()}


def gaussian(model: nn.Module, seed: int = 1, scale: float = 0.2) -> DiagonalGaussian:
    return DiagonalGaussian(
        random_like(model, 0.3, seed), {n: v.abs() for n, v in random_like(model, scale, seed + 1).items()}
    )


def low_rank(model: nn.Module, seed: int = 1) -> LowRankGaussian:
    deviations = {n: torch.stack([0.1 * v, -0.2 * v, 0.1 * v]) for n, v in random_like(model, 1.0, seed + 2).items()}
    return LowRankGaussian(gaussian(model, seed).mean, gaussian(model, seed).std, deviations)


def kronecker(model: nn.Module) -> KroneckerGaussian:
    mean = random_like(model, 0.3, 5)
    left = {n: torch.linalg.qr(torch.randn(len(v), 2, generator=seeded(6)))[0] for n, v in mean.items()}
    right = {n: torch.linalg.qr(torch.randn(v.shape[1], 3, generator=seeded(7)))[0] for n, v in mean.items()}
    return KroneckerGaussian(mean, left, right, {n: torch.full((2, 3), 0.02) for n in mean}, torch.tensor(0.01))


def dropout(model: nn.Module) -> Dropout:
    mean = random_like(model, 0.3, 8)
    return Dropout(mean, {name: torch.tensor(0.2) for name in mean if "lora_A" in name})


POSTERIORS = {
    "point": lambda model: Point(random_like(model, 0.3, 9)),
    "diagonal_gaussian": gaussian,
    "low_rank_gaussian": low_rank,
    "kronecker_gaussian": kronecker,
    "dropout": dropout,
    "pruned": lambda model: gaussian(model).prune(0.3),
    "tempered": lambda model: Tempered(gaussian(model), 1.5, 1.2),
    "mixture": lambda model: Mixture([gaussian(model), Point(random_like(model, 0.3, 4)), low_rank(model)]),
    "mixture of mixtures": lambda model: Mixture([Mixture([gaussian(model), dropout(model)]), gaussian(model, 7)]),
    "mixture of tempered": lambda model: Mixture([Tempered(gaussian(model), 2.0, 1.0), gaussian(model, 7)]),
    "mixture of linearised": lambda model: Mixture([Linearised(gaussian(model, 7)), gaussian(model)]),
}


@torch.no_grad()
def logits(model: nn.Module, posterior: Any, how: Drawing, n: int = S, batch: Any = BATCH) -> Tensor:
    return posterior.drawn(n, seeded(), how).logits(model, batch, class_logits)


def check_same(model: nn.Module, posterior: Any, tolerance: float = 2e-5, batch: Any = BATCH, **how: Any) -> Tensor:
    """The stack gives the loop's logits, and leaves the model as it was."""
    before, forwards = copied(model), [module.forward for module in model.modules()]
    expected = logits(model, posterior, Drawing(stacked=False, **how), batch=batch)
    found = logits(model, posterior, Drawing(**how), batch=batch)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(p, before[name]) for name, p in trainable(model).items())
    assert [module.forward for module in model.modules()] == forwards
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    if len(expected) > 1:
        assert (expected.std(0) > 1e-3).any()  # so that draws in another order, or all the same, would show
    return found


def stacks(model: nn.Module, posterior: Any, how: Drawing = PLAIN, batch: Any = BATCH) -> stack.Stack:
    """Return a stack that has run, to see how."""
    drawn = posterior.drawn(S, seeded(), how)
    with torch.no_grad():
        drawn.logits(model, batch, class_logits)
    return drawn


# --- the same logits


@pytest.mark.parametrize("kind", POSTERIORS)
@pytest.mark.parametrize("last_layers", [None, 1])
def test_every_posterior_gives_the_loops_logits(model, kind, last_layers):
    check_same(model, POSTERIORS[kind](model), last_layers=last_layers)


def test_the_loop_is_one_draw_at_a_time_in_the_model(model):
    """The loop itself against the context that the protocol promises."""
    posterior, source, expected = gaussian(model), seeded(), []
    for _ in range(S):
        with torch.no_grad(), posterior.sampled(model, source):
            expected.append(class_logits(model, BATCH))
    assert torch.equal(logits(model, posterior, LOOP), torch.stack(expected))


def test_a_mixture_takes_its_members_in_turn(model):
    first, second = Point(random_like(model, 0.3, 1)), Point(random_like(model, 0.3, 2))
    found = logits(model, Mixture([first, second]), Drawing(), n=5)
    alone = [logits(model, one, LOOP)[0] for one in (first, second)]
    torch.testing.assert_close(found, torch.stack([alone[0], alone[1]] * 3))
    assert stacks(model, Mixture([first, second])).passes == 2 * len(ROWS)  # draws that are the same run once


SIZES: dict[str, Any] = {
    "vocab_size": helpers.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FLAT = ("mixtral", "opt", "qwen2_moe")
"""Architectures of which some layers see tokens without rows."""
SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gptj": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
}


def of_architecture(name: str, targets: Any = "all-linear") -> Any:
    """Return a random model of an architecture with LoRA on its linear layers."""
    torch.manual_seed(0)
    sizes = {key: value for key, value in SIZES.items() if (name, key) != ("falcon", "head_dim")}
    config = AutoConfig.for_model(name, **{**sizes, **SETTINGS.get(name, {})})
    base = AutoModelForCausalLM.from_config(config).eval()
    for parameter in base.parameters():
        parameter.data.mul_(4.0)  # for differences that can be seen
    return get_peft_model(base, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()


@pytest.mark.parametrize("name", blocks.RESUMABLE)
def test_every_architecture_gives_the_loops_logits(name):
    model = of_architecture(name)
    posterior = DiagonalGaussian(copied(model), {n: torch.full_like(p, 0.1) for n, p in copied(model).items()})
    batches = (BATCH, BEGUN) if name != "mpt" else (collate(ROWS[:1], 0),)
    for batch in batches:
        for last_layers in (None, 1):
            check_same(model, posterior, tolerance=2e-4, batch=batch, last_layers=last_layers)
        assert stacks(model, posterior, batch=batch)._stackable == (name not in FLAT)
    known = name in blocks.FAMILIES
    assert (prefix.divided(model, BEGUN) is not None) == known
    last = model.get_submodule(block_path(model))[-1]
    after = blocks._ends_in(model, last, blocks.AFTER_ATTENTION)
    assert len(after) == (2 if known else 0), after  # attention's output and the MLP, and nothing besides
    assert bool(blocks._ends_in(model, last, blocks.SEES_INPUT)) == known


def test_rows_are_not_divided_where_what_follows_is_seen_from_before():
    model = of_architecture("gemma3_text")
    assert prefix.divided(model, BEGUN) is not None
    model.config.use_bidirectional_attention = True
    assert prefix.divided(model, BEGUN) is None


def block_path(model: nn.Module) -> str:
    (path,) = {place[0] for name in trainable(model) if (place := blocks.block_of(name))}
    return path


def test_what_is_the_same_is_computed_once(model, monkeypatch):
    """Without either shortcut there is more arithmetic; with both, as much less as they say."""

    def operations() -> int:
        with FlopCounterMode(display=False) as counter:
            stacks(model, gaussian(model), Drawing(tokens=10**6))
        return int(counter.get_total_flops())

    tokens, both = BATCH["input_ids"].numel(), operations()
    attention, mlp = model.get_submodule(block_path(model))[0].self_attn, model.get_submodule(block_path(model))[-1].mlp
    of_input = [attention.q_proj.base_layer, attention.k_proj, attention.v_proj.base_layer]
    after = [attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]

    def weights(layers: list[Any]) -> int:
        return sum(p.numel() for layer in layers for p in layer.parameters())

    monkeypatch.setattr(blocks, "SEES_INPUT", ())
    without = operations()
    assert without - both == 2 * (S - 1) * tokens * weights(of_input)
    monkeypatch.setattr(blocks, "ASK_A_CACHE", ())  # of other families, what comes after attention alone
    partly = operations()
    others, last = S * (tokens - len(ROWS)), S * len(ROWS)  # whose keys and values are made twice
    saved = others * weights([attention.q_proj]) - last * weights([attention.k_proj, attention.v_proj])
    assert partly - without == 2 * saved  # what attention does with them is not counted on a CPU
    monkeypatch.setattr(blocks, "AFTER_ATTENTION", ())
    assert operations() - partly == 2 * others * weights(after)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_rows_of_one_length_have_no_mask_and_the_loops_logits(name, implementation):
    model = of_architecture(name)
    model.base_model.model.set_attn_implementation(implementation)
    posterior = DiagonalGaussian(copied(model), {n: torch.full_like(p, 0.1) for n, p in copied(model).items()})
    batch = collate([row for row in helpers.make_rows(30) if len(row.input_ids) == 8][:3], 0)
    assert batch["attention_mask"].all()
    for last_layers in (None, 1):
        check_same(model, posterior, tolerance=2e-4, batch=batch, last_layers=last_layers)


@pytest.mark.parametrize("mask", [object(), None], ids=["mask", "cache"])
def test_a_block_with_another_kind_of_mask_or_that_asks_no_cache_runs_whole(mask):
    """As flexible attention's, whose part for the last position cannot be taken; or as later versions may have it."""
    model = of_architecture("llama")
    last = model.get_submodule(block_path(model))[-1]
    last.forward = Mock(return_value="all positions")
    states = torch.ones(2, 5, 4)
    given = {"attention_mask": mask, "past_key_values": None, "position_embeddings": ()}
    with blocks.last_position(model, last):
        assert last(states, **given) == "all positions"
    last.forward.assert_called_with(states, **given)


@pytest.mark.parametrize("draws_a_pass", [S, 4, 1])
def test_what_rows_begin_with_is_run_once_a_draw(model, draws_a_pass):
    width = BATCH["input_ids"].shape[1]
    drawn = gaussian(model).drawn(S, seeded(), Drawing(tokens=draws_a_pass * len(ROWS) * width))

    def passes(at_once: int) -> list[int]:
        return [min(at_once, S - start) for start in range(0, S, at_once)]

    rest = [(n * len(ROWS), width) for n in passes(draws_a_pass)]
    first = [(n, len(START)) for n in passes(draws_a_pass * len(ROWS) * width // len(START))]
    assert shapes_of(model, drawn, BEGUN) == first + rest
    assert shapes_of(model, drawn, BEGUN) == rest  # the first part is kept
    assert drawn._stackable


def shapes_of(model: nn.Module, drawn: Any, batch: Any) -> list[tuple[int, int]]:
    """Return rows and tokens of each pass that drawing the logits of a batch takes; they are the loop's."""
    seen: list[tuple[int, int]] = []
    layer = model.get_submodule(block_path(model))[0].mlp.gate_proj
    hook = layer.register_forward_hook(lambda layer, args, output: seen.append(tuple(args[0].shape[:2])))
    try:
        with torch.no_grad():
            found = drawn.logits(model, batch, class_logits)
    finally:
        hook.remove()
    torch.testing.assert_close(found, looped(model, drawn, batch), rtol=2e-5, atol=2e-5)
    return seen


@torch.no_grad()
def looped(model: nn.Module, drawn: Any, batch: Any) -> Tensor:
    """The logits of a stack's own draws, one model after the other."""
    found = []
    for draw in drawn.models():
        with swapped(model, draw.weights):
            found.append(class_logits(model, batch))
    return torch.stack(found)


def after(*rows: Any, start: tuple[int, ...] = START) -> Any:
    return collate([dataclasses.replace(row, input_ids=start + row.input_ids) for row in rows], 0)


def test_single_rows_go_on_from_what_the_ones_before_began_with(model):
    drawn = gaussian(model).drawn(S, seeded())
    whole, rest = [len(START) + len(row.input_ids) for row in ROWS], [len(row.input_ids) for row in ROWS]
    assert shapes_of(model, drawn, after(ROWS[0])) == [(S, whole[0])]  # nobody knows where the instruction ends
    assert shapes_of(model, drawn, after(ROWS[1])) == [(S, len(START)), (S, rest[1])]
    assert shapes_of(model, drawn, after(ROWS[2])) == [(S, rest[2])]
    assert shapes_of(model, drawn, collate(ROWS[:1], 0)) == [(S, rest[0])]  # without the instruction: whole
    assert shapes_of(model, drawn, after(ROWS[3])) == [(S, whole[3])]
    assert shapes_of(model, drawn, after(ROWS[4])) == [(S, len(START)), (S, rest[4])]
    longer = (*START, 3, 4)  # what two rows have in common by chance is no reason to run more
    assert shapes_of(model, drawn, after(ROWS[0], ROWS[0], start=longer))[0] == (2 * S, rest[0] + 2)
    # but what many have in common is
    assert shapes_of(model, drawn, after(*ROWS[:1] * 8, start=(*START, *range(3, 13))))[0][0] == S
    assert shapes_of(model, drawn, after(ROWS[2])) == [(S, len(START)), (S, rest[2])]


def test_draws_that_stop_early_go_on_as_well(model):
    how = Drawing(tolerance=0.2, tokens=3 * 40)
    drawn = gaussian(model, scale=0.05).drawn(16, seeded(), how)
    expected = gaussian(model, scale=0.05).drawn(16, seeded(), dataclasses.replace(how, stacked=False))
    for row in ROWS:
        with torch.no_grad():
            found, alone = (one.logits(model, after(row), class_logits) for one in (drawn, expected))
        torch.testing.assert_close(found, alone, rtol=2e-5, atol=2e-5)
    assert drawn.passes == expected.passes < 16 * len(ROWS)


@pytest.mark.parametrize("name", blocks.FAMILIES)
def test_every_family_keeps_what_rows_begin_with(name):
    model = of_architecture(name)
    posterior = DiagonalGaussian(copied(model), {n: torch.full_like(p, 0.1) for n, p in copied(model).items()})
    drawn = posterior.drawn(S, seeded(), Drawing(tokens=4 * 20))
    for row in ROWS:
        with torch.no_grad():
            found = drawn.logits(model, after(row), class_logits)
        torch.testing.assert_close(found, looped(model, drawn, after(row)), rtol=2e-4, atol=2e-4)
    kept = drawn._beginning._cache
    sizes = {(*layer.keys.shape[:1], layer.keys.shape[2]) for layer in kept.layers}
    assert sizes == {(S, len(START))}  # as it was before rows went on from it
    taken = sum(layer.keys.nbytes + layer.values.nbytes for layer in kept.layers)
    unused = 2 if name in ("gpt2", "gpt_neox") else 1  # they are given groups of heads here that they do not have
    assert taken == S * len(START) * prefix._bytes_of_token(model) * unused


def test_nothing_is_kept_that_is_too_large(model, monkeypatch):
    rest = [len(row.input_ids) for row in ROWS]
    monkeypatch.setattr(prefix, "KEPT_BYTES", (len(START) - 2) * S * prefix._bytes_of_token(model))
    drawn = gaussian(model).drawn(S, seeded())
    shapes = [shapes_of(model, drawn, after(row)) for row in ROWS[:3]]
    assert shapes[1] == [(S, len(START) - 2), (S, 2 + rest[1])]  # as much as there is room for
    assert shapes[2] == [(S, 2 + rest[2])]
    monkeypatch.setattr(prefix, "KEPT_BYTES", 0)
    drawn = gaussian(model).drawn(S, seeded())
    assert [len(shapes_of(model, drawn, after(row))) for row in ROWS[:3]] == [1, 1, 1]
    width = BATCH["input_ids"].shape[1]
    for _ in range(2):
        assert shapes_of(model, drawn, BEGUN) == [(S, len(START)), (S * len(ROWS), width)]


def test_what_is_kept_is_of_the_model_that_is_asked(model):
    other, drawn = helpers.tiny_model(dropout=0.1), gaussian(model).drawn(S, seeded())
    other.get_input_embeddings().weight.data.mul_(1.5)
    ways = [(model, torch.float32), (other, torch.float32), (other, torch.float64), (model, torch.float32)]
    for of, dtype in ways:
        of.to(dtype)
        for row in ROWS[:3]:
            shapes = shapes_of(of, drawn, after(row))
        assert shapes == [(S, len(ROWS[2].input_ids))]


def test_nothing_is_kept_with_gradients(model):
    drawn = gaussian(model).drawn(S, seeded())
    for row in ROWS[:3]:
        drawn.logits(model, after(row), class_logits)
        assert drawn._beginning._cache is None


@pytest.mark.parametrize("kind", POSTERIORS)
def test_every_posterior_goes_on_from_what_rows_begin_with(model, kind):
    check_same(model, POSTERIORS[kind](model), batch=BEGUN)


@pytest.mark.parametrize("adapter", ["float32", None], ids=["adapter in full", "adapter in half"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_goes_on_from_what_rows_begin_with(dtype, adapter):
    model = helpers.tiny_model(dtype=dtype, adapter=adapter or dtype)
    check_same(model, gaussian(model), tolerance=0.03 if dtype == "bfloat16" else 4e-3, batch=BEGUN)


@pytest.mark.parametrize(
    "settings", [{"sliding_window": 8}, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}]
)
def test_where_distance_or_length_matters_rows_run_whole(settings, monkeypatch):
    monkeypatch.setitem(SETTINGS, "mistral", settings)
    model = of_architecture("mistral")
    posterior = DiagonalGaussian(copied(model), {n: torch.full_like(p, 0.1) for n, p in copied(model).items()})
    assert prefix.divided(model, BEGUN) is None
    check_same(model, posterior, tolerance=2e-4, batch=BEGUN)


def test_rows_that_do_not_begin_alike_run_whole(model):
    rows = [dataclasses.replace(row, input_ids=START + row.input_ids) for row in ROWS]
    short = dataclasses.replace(ROWS[0], input_ids=START)  # nothing follows
    other = dataclasses.replace(ROWS[0], input_ids=(3, *START[1:]))

    def shared(rows: Any) -> int:
        found = prefix.divided(model, collate(rows, 0))
        return 0 if found is None else found[0].shape[1]

    assert shared(rows) == len(START)
    assert shared([*rows, short]) == len(START) - 1  # a token is left to read the answer at
    assert shared([*rows, other]) == shared(rows[:1]) == shared(ROWS) == 0
    right = collate(rows, 0)
    right = {**right, "attention_mask": right["attention_mask"].flip(1)}
    assert right["attention_mask"].min() == 0
    assert prefix.divided(model, right) is None  # padded on the right, which nothing here is
    check_same(model, gaussian(model), batch=collate([*rows, short], 0))
    model.train()
    try:
        assert shared(rows) == 0  # each row has dropout of its own
    finally:
        model.eval()


def scores(model: nn.Module, batch: Any) -> Tensor:
    """Read every position, as the score of a text does."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.log_softmax(-1)[..., :3].mean(1)


def differences(model: nn.Module, batch: Any) -> Tensor:
    """Call the model twice, as comparing with a blank prompt does."""
    blank = {**batch, "input_ids": torch.full_like(batch["input_ids"], 7)}
    return (class_logits(model, batch) - class_logits(model, blank)).nan_to_num()


@pytest.mark.parametrize("forward", [scores, differences])
@pytest.mark.parametrize("last_layers", [None, 1])
def test_other_functions_of_the_model_are_stacked_without_leaving_anything_out(model, forward, last_layers):
    posterior = gaussian(model)
    with torch.no_grad():
        found, expected = (
            posterior.drawn(S, seeded(), Drawing(stacked=is_stacked, last_layers=last_layers)).logits(
                model, BATCH, forward
            )
            for is_stacked in (True, False)
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_below_the_last_layers_the_mean_stands_whatever_the_model_has():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](torch.tanh(self.layers[0](x)))

    net, x = Net(), torch.randn(4, 3, generator=seeded(3))
    net = nn.Sequential(net)
    posterior = gaussian(net)
    found, expected = (
        posterior.drawn(S, seeded(), Drawing(stacked=is_stacked, last_layers=1)).logits(net, x, lambda m, b: m(b))
        for is_stacked in (True, False)
    )
    torch.testing.assert_close(found, expected)


def test_layers_to_transform_leave_the_blocks_below_alone():
    """Without options, blocks below the first that has an adapter run once, also where the model must run whole."""
    for name in ("llama", "gemma3_text"):
        base = of_architecture(name).unload()
        model = get_peft_model(
            base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[2], init_lora_weights=False)
        ).eval()
        posterior = DiagonalGaussian(copied(model), {n: torch.full_like(p, 0.1) for n, p in copied(model).items()})
        check_same(model, posterior, tolerance=2e-4)
        known, blocks.RESUMABLE = blocks.RESUMABLE, ()
        try:
            check_same(model, posterior, tolerance=2e-4)
        finally:
            blocks.RESUMABLE = known


@pytest.mark.parametrize("adapter", ["float32", None], ids=["adapter in full", "adapter in half"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, adapter):
    model = helpers.tiny_model(dtype=dtype, adapter=adapter or dtype)
    check_same(model, gaussian(model), tolerance=0.03 if dtype == "bfloat16" else 4e-3)


QUERY = {"target_modules": ["q_proj", "v_proj"]}
ADAPTERS: dict[str, tuple[bool, dict[str, Any]]] = {
    "rslora": (True, {**QUERY, "use_rslora": True}),
    "biases of B": (True, {**QUERY, "lora_bias": True}),
    "biases of the base": (False, {**QUERY, "bias": "lora_only"}),
    "a layer in full": (True, {**QUERY, "modules_to_save": ["lm_head"]}),
    "a norm in full": (False, {**QUERY, "modules_to_save": ["norm"]}),
    "the output layer": (True, {"target_modules": ["q_proj", "lm_head"]}),
    "a pattern of names": (True, {"target_modules": r".*\.layers\.[12]\.self_attn\.[qv]_proj"}),
    "several ranks": (True, {**QUERY, "rank_pattern": {r"layers\.1\.\w+\.q_proj": 5}, "alpha_pattern": {"v_proj": 3}}),
    "some tokens": (False, {**QUERY, "trainable_token_indices": [5, 6, 7]}),
    "a parameter": (False, {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
    "layers used again": (True, {**QUERY, "layer_replication": [[0, 2], [1, 2]]}),
}
"""Settings of LoRA, and whether such draws are stacked."""


@pytest.mark.parametrize("case", ADAPTERS)
def test_every_setting_of_lora_gives_the_loops_logits(case):
    stackable, settings = ADAPTERS[case]
    base = of_architecture("qwen2").unload()  # whose queries and values have biases
    model = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, **settings)).eval()
    posterior = DiagonalGaussian(copied(model), {n: torch.full_like(p, 0.1) for n, p in copied(model).items()})
    check_same(model, posterior, tolerance=2e-4, batch=BEGUN)
    assert stacks(model, posterior)._stackable == stackable


@pytest.mark.parametrize(
    "settings",
    [
        {
            "target_modules": ["q_proj", "v_proj", "gate_proj"],
            "alora_invocation_tokens": [*START[:2]],
            "task_type": "CAUSAL_LM",
        },
        {"target_modules": ["embed_tokens", "q_proj"]},
        {**QUERY, "trainable_token_indices": [5, 6, 7]},
    ],
    ids=["alora", "embedding", "some tokens"],
)
def test_the_last_layers_of_a_model_whose_input_has_an_adapter(settings):
    """Which is frozen here, or sees what the pass is given."""
    model = with_adapter(**settings)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and ".layers." in name)
    posterior = DiagonalGaussian(copied(model), {n: torch.full_like(p, 0.1) for n, p in copied(model).items()})
    check_same(model, posterior, tolerance=2e-4, batch=BEGUN, last_layers=1)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantised_base(quantization):
    model = helpers.tiny_model(quantization=quantization)
    set_outliers(model, 0.0)
    for last_layers in (None, 1):
        check_same(model, gaussian(model), last_layers=last_layers)
    assert stacks(model, gaussian(model))._stackable


def test_8_bit_outliers_are_of_the_whole_batch():
    """LLM.int8 keeps columns with an outlier in any row in 16 bit, so a row's logits depend on its company: no more in
    a stack than in a loop over other batches."""
    model = helpers.tiny_model(quantization="8bit")
    loop, found = (logits(model, gaussian(model), how) for how in (LOOP, PLAIN))
    alone = [logits(model, gaussian(model), LOOP, batch=collate([row], 0))[:, 0] for row in ROWS]
    apart = max((one - loop[:, i, : one.shape[-1]]).abs().max().item() for i, one in enumerate(alone))
    known = loop.isfinite()
    assert 1e-3 < (found - loop)[known].abs().max().item() < 3 * apart
    set_outliers(model, 0.0)
    torch.testing.assert_close(*(logits(model, gaussian(model), how) for how in (LOOP, PLAIN)), rtol=2e-5, atol=2e-5)


def set_outliers(model: nn.Module, threshold: float) -> None:
    """Set from what size on an input is an outlier to an 8-bit layer; 0: none is."""
    for layer in model.modules():
        if hasattr(layer, "state") and hasattr(layer.state, "threshold"):
            layer.state.threshold = threshold


def test_biases_that_are_drawn():
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    posterior, x = gaussian(net), torch.randn(4, 3, generator=seeded(2))
    found, expected = (posterior.drawn(S, seeded(), how).logits(net, x, lambda m, b: m(b)) for how in (Drawing(), LOOP))
    torch.testing.assert_close(found, expected)


# --- where draws cannot be stacked


def counted(model: nn.Module, posterior: Any) -> int:
    """Return the passes that drawing takes."""
    passes = []

    def forward(model: nn.Module, batch: Any) -> Tensor:
        passes.append(len(batch["input_ids"]))
        return class_logits(model, batch)

    with torch.no_grad():
        posterior.drawn(S, seeded()).logits(model, BATCH, forward)
    return len(passes)


def with_adapter(**settings: Any) -> Any:
    torch.manual_seed(0)
    base = helpers.tiny_model().unload()
    return get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, **settings)).eval()


NOT_LINEAR = {
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("case", NOT_LINEAR)
def test_adapters_of_other_kinds_are_drawn_one_after_the_other(case):
    model = with_adapter(**NOT_LINEAR[case])
    posterior = DiagonalGaussian(copied(model), {n: torch.full_like(p, 0.1) for n, p in copied(model).items()})
    check_same(model, posterior)
    assert counted(model, posterior) == S
    assert not stacks(model, posterior)._stackable


def test_a_layer_that_sees_other_rows_than_the_batch_is_not_stacked():
    """As experts of a mixture do, which see the tokens that are sent to them."""

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Linear(3, 3, bias=False)
            self.expert = nn.Linear(3, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.before(x)  # so that draws send other rows
            y = x[..., :2].clone()
            sent = x[:, 0] > 0
            y[sent] = self.expert(x[sent])
            return y

    net, x = Router(), torch.tensor([[1.0, 2.0, 3.0], [-1.0, 2.0, 3.0], [1.0, 0.5, 0.1]])
    posterior = gaussian(net)
    found, expected = (posterior.drawn(S, seeded(), how).logits(net, x, lambda m, b: m(b)) for how in (Drawing(), LOOP))
    assert torch.equal(found, expected)


def test_a_layer_that_is_not_called_is_not_stacked():
    """Adapters whose weights are read but whose layers are not called would all give the same."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.a.weight.T

    net, x = Net(), torch.ones(2, 3)
    found, expected = (
        gaussian(net).drawn(S, seeded(), how).logits(net, x, lambda m, b: m(b)) for how in (Drawing(), LOOP)
    )
    assert torch.equal(found, expected)


def test_a_weight_of_two_layers_is_not_stacked():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    net, x = Net(), torch.randn(2, 3, generator=seeded(4))
    posterior = gaussian(net)
    found, expected = (posterior.drawn(S, seeded(), how).logits(net, x, lambda m, b: m(b)) for how in (PLAIN, LOOP))
    assert torch.equal(found, expected)


def test_one_draw_is_not_stacked(model):
    drawn = gaussian(model).drawn(1, seeded())
    assert not drawn._stackable
    with torch.no_grad():
        assert drawn.logits(model, BATCH, class_logits).shape[0] == 1
    assert drawn.passes == len(ROWS)


def test_compiled_models_are_drawn_one_after_the_other(model):
    """Their code is made for the layers as they are."""
    compiled = torch.compile(model, backend="eager")
    assert not stack.can_stack(compiled, BATCH)
    assert not stack.can_stack(nn.DataParallel(nn.Linear(1, 1)), BATCH)
    assert stack.can_stack(model, BATCH)


# --- memory


def test_draws_are_divided_by_tokens_and_the_logits_stay(model):
    whole = logits(model, gaussian(model), Drawing(tokens=10**6))
    width = BATCH["input_ids"].numel()
    for tokens, passes in ((1, S), (width, S), (2 * width, S // 2), (4 * width + 1, 2), (S * width, 1)):
        runs = []

        def forward(model: nn.Module, batch: Any, runs: list[int] = runs) -> Tensor:
            runs.append(len(batch["input_ids"]) // len(ROWS))
            return class_logits(model, batch)

        with torch.no_grad():
            found = gaussian(model).drawn(S, seeded(), Drawing(tokens=tokens)).logits(model, BATCH, forward)
        assert len(runs) == passes
        assert sum(runs) == S
        torch.testing.assert_close(found, whole, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_where_memory_runs_out_half_as_many_draws_go_on(model, error):
    runs = []

    def forward(model: nn.Module, batch: Any) -> Tensor:
        runs.append(len(batch["input_ids"]) // len(ROWS))
        if runs[-1] > 2:
            raise error
        return class_logits(model, batch)

    drawn = gaussian(model).drawn(S, seeded(), Drawing(tokens=10**6))
    with torch.no_grad():
        found = drawn.logits(model, BATCH, forward)
        torch.testing.assert_close(found, logits(model, gaussian(model), LOOP), rtol=2e-5, atol=2e-5)
        assert runs == [6, 3, 1, 1, 1, 1, 1, 1]
        runs.clear()
        drawn.logits(model, BATCH, forward)
        assert runs == [1] * S  # what was learned is kept


@contextmanager
def little_memory(model: nn.Module, tokens: int) -> Iterator[list[tuple[int, int]]]:
    """Within the context, the last block has no memory for more tokens; yield rows and tokens of each pass in turn."""
    seen: list[tuple[int, int]] = []

    def check(layer: nn.Module, args: tuple[Tensor]) -> None:
        rows, width, _ = args[0].shape
        if width == 1:  # the last position, once keys and values of all are known
            return
        seen.append((rows, width))
        assert len(seen) < 100  # it ends
        if rows * width > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = model.get_submodule(block_path(model))[-1].input_layernorm.register_forward_pre_hook(check)
    try:
        yield seen
    finally:
        hook.remove()


def test_where_memory_runs_out_for_what_rows_begin_with_half_as_many_draws_make_it(model):
    two, rest = after(*ROWS[:2]), max(len(row.input_ids) for row in ROWS[:2])
    drawn = gaussian(model).drawn(S, seeded(), Drawing(tokens=10**6))
    with torch.no_grad(), little_memory(model, 3 * len(START)) as seen:
        found = drawn.logits(model, two, class_logits)
    torch.testing.assert_close(found, looped(model, drawn, two), rtol=2e-5, atol=2e-5)
    assert seen == [(n, len(START)) for n in (6, 3, 3)] + [(2 * n, rest) for n in (2, 2, 2)]


def test_one_draw_that_has_no_room_after_what_rows_begin_with_is_tried_once(model):
    """However many draws that may be made of at once."""
    batch = after(*helpers.make_rows(20))
    drawn = gaussian(model).drawn(S, seeded(), Drawing(tokens=S * len(START)))
    with torch.no_grad(), little_memory(model, S * len(START)) as seen, pytest.raises(torch.OutOfMemoryError):
        drawn.logits(model, batch, class_logits)
    assert [rows for rows, _ in seen] == [S, 20]


def test_where_there_is_no_room_for_all_that_would_be_kept_nothing_is(model, monkeypatch):
    def joined(caches: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(prefix, "_joined", joined)
    drawn = gaussian(model).drawn(S, seeded(), Drawing(tokens=10**6))
    with torch.no_grad():
        for _ in range(2):
            found = drawn.logits(model, BATCH, class_logits)
            torch.testing.assert_close(found, looped(model, drawn, BATCH), rtol=2e-5, atol=2e-5)
            monkeypatch.setattr(prefix, "_joined", pytest.fail)  # it is not tried again


@pytest.mark.parametrize("kept", [True, False])
def test_where_memory_runs_out_for_what_follows_half_as_many_draws_go_on(model, kept, monkeypatch):
    """And what the failed pass went on from is freed before more is made."""
    if not kept:
        monkeypatch.setattr(prefix, "KEPT_BYTES", 0)
    made: list[Any] = []

    def begun(*args: Any) -> Any:
        assert kept or not any(cache() for cache in made)
        cache = prefix.begun(*args)
        made.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(stack, "begun", begun)
    (rows, width), first = BATCH["input_ids"].shape, len(START)
    drawn = gaussian(model).drawn(S, seeded(), Drawing(tokens=10**6))
    with torch.no_grad(), little_memory(model, 2 * rows * width) as seen:
        found = [drawn.logits(model, BEGUN, class_logits) for _ in range(2)]
    expected = looped(model, drawn, BEGUN)
    for one in found:
        torch.testing.assert_close(one, expected, rtol=2e-5, atol=2e-5)
    if kept:
        assert seen == [(S, first)] + [(n * rows, width) for n in (6, 3, 1, 1, 1, 1, 1, 1)] + S * [(rows, width)]
    else:
        assert seen == [(n * r, w) for n in (6, 3, *[1] * 2 * S) for r, w in ((1, first), (rows, width))]
    assert len(made) == (1 if kept else len(seen) // 2)


def test_where_memory_runs_out_at_the_last_layers_half_as_many_draws_go_on(model):
    """What lies below is not run again."""
    below: list[int] = []
    hook = model.get_submodule(block_path(model))[0].mlp.register_forward_hook(lambda *of: below.append(len(of[2])))
    drawn = gaussian(model).drawn(S, seeded(), Drawing(last_layers=1, tokens=10**6))
    (rows, width) = BATCH["input_ids"].shape
    try:
        with torch.no_grad(), little_memory(model, 3 * rows * width) as seen:
            found = [drawn.logits(model, BATCH, class_logits) for _ in range(2)]
    finally:
        hook.remove()
    for one in found:
        torch.testing.assert_close(one, looped(model, drawn, BATCH), rtol=2e-5, atol=2e-5)
    assert seen == [(n * rows, width) for n in (6, 3, 3, 3, 3)]
    assert below == [rows, rows]


def test_a_cpus_pass_has_1024_tokens_a_thread(model, monkeypatch):
    rows = helpers.make_rows(40)
    batch, drawn = collate(rows, 0), gaussian(model).drawn(S, seeded())
    width = batch["input_ids"].shape[1]
    assert 2 * 40 * width <= 1024 < 3 * 40 * width
    assert shapes_of(model, drawn, batch) == [(2 * 40, width)] * 3
    assert 5 * 40 * width <= 2048 < 6 * 40 * width
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert shapes_of(model, gaussian(model).drawn(S, seeded()), batch) == [(5 * 40, width), (40, width)]


def test_a_gpus_passes_are_as_large_as_the_first_shows_that_there_is_room_for(model, monkeypatch):
    """Of 7/10 of the memory that is free, or that torch holds and does not use, a token taking what it took first."""
    rows, width = BATCH["input_ids"].shape
    device, room, measured = torch.device("cuda"), stack.Stack._room, stack.Stack._measured
    monkeypatch.setattr(stack.Stack, "_room", lambda self, of: room(self, device))
    monkeypatch.setattr(stack.Stack, "_measured", lambda self, tokens, of: measured(self, tokens, device))
    took, peak = 10 * rows * width, [10**6]
    memory = {
        "reset_peak_memory_stats": lambda of: peak.__setitem__(0, 5000),
        "memory_allocated": lambda of: 5000,
        "max_memory_allocated": lambda of: peak[0] + took,
        "memory_reserved": lambda of: 5000 + took,
        "mem_get_info": lambda of: (4 * took, 10**9),
    }
    for name, value in memory.items():
        monkeypatch.setattr(torch.cuda, name, value)
    drawn = gaussian(model).drawn(S, seeded())
    assert 3 <= 0.7 * (4 + 1) < 4
    assert shapes_of(model, drawn, BATCH) == [(n * rows, width) for n in (1, 3, 2)]
    assert shapes_of(model, drawn, BATCH) == [(n * rows, width) for n in (3, 3)]  # measured once


def test_where_not_even_one_draw_has_room_the_error_is_told(model):
    def forward(model: nn.Module, batch: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        gaussian(model).drawn(S, seeded()).logits(model, BATCH, forward)

    def broken(model: nn.Module, batch: Any) -> Tensor:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        gaussian(model).drawn(S, seeded()).logits(model, BATCH, broken)


# --- what is left out for speed


def test_below_the_last_layers_all_is_at_the_mean(model):
    posterior = gaussian(model)
    still = {n: s * ("layers.1." in n) for n, s in posterior.std.items()}
    quiet = DiagonalGaussian(posterior.mean, still)
    found = logits(model, posterior, Drawing(last_layers=1))
    torch.testing.assert_close(found, logits(model, quiet, LOOP), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(logits(model, posterior, Drawing(last_layers=9)), logits(model, posterior, LOOP))


def test_the_layers_below_are_computed_once(model):
    first, calls = model.get_submodule(block_path(model))[0], []
    hook = first.self_attn.register_forward_hook(lambda module, args, output: calls.append(output[0].shape[0]))
    try:
        stacks(model, gaussian(model), Drawing(last_layers=1))
    finally:
        hook.remove()
    assert calls == [len(ROWS)]


def test_antithetic_draws_mirror_one_another(model):
    posterior = gaussian(model)
    draws = posterior.drawn(S, seeded(), Drawing(noise="antithetic")).draws()
    alone = posterior.drawn(S // 2, seeded()).draws()
    for name, mean in posterior.mean.items():
        for i in range(0, S, 2):
            assert torch.equal(draws[i][name], alone[i // 2][name])
            torch.testing.assert_close((draws[i][name] + draws[i + 1][name]) / 2, mean)
    with pytest.raises(VarloraError, match=r"symmetric .* but a dropout is not"):
        dropout(model).drawn(S, seeded(), Drawing(noise="antithetic"))
    with pytest.raises(VarloraError, match="a pruned is not"):
        Mixture([posterior, dropout(model).prune(0.1, by="magnitude")]).drawn(S, seeded(), Drawing(noise="antithetic"))


def test_latin_draws_have_one_in_each_range(model):
    posterior = gaussian(model)
    draws = posterior.drawn(S, seeded(), Drawing(noise="latin")).draws()
    for name, mean in posterior.mean.items():
        z = (torch.stack([draw[name] for draw in draws]) - mean) / posterior.std[name].clamp(min=1e-12)
        ranges = (torch.special.ndtr(z.double()) * S).floor().clamp(0, S - 1)
        assert torch.equal(ranges.sort(0).values, torch.arange(S).double().view(-1, 1, 1).expand_as(z))
    again = posterior.drawn(S, seeded(), Drawing(noise="latin")).draws()
    other = posterior.drawn(S, seeded(1), Drawing(noise="latin")).draws()
    name = min(posterior.mean)
    assert torch.equal(draws[0][name], again[0][name])
    assert not torch.equal(draws[0][name], other[0][name])


@pytest.mark.parametrize("noise", ["antithetic", "latin"])
def test_fewer_such_draws_give_the_same_average(model, noise):
    """Over many sets of draws, their average probabilities are unbiased, and scatter less."""
    posterior = gaussian(model, scale=0.1)

    @torch.no_grad()
    def averages(kind: str) -> Tensor:
        sets = [
            posterior.drawn(4, seeded(i), Drawing(noise=kind)).logits(model, BATCH, class_logits) for i in range(60)
        ]
        return torch.stack(sets).softmax(-1).mean(1)  # (60, B, C)

    plain, better = averages("independent"), averages(noise)
    error = (plain.var(0) / 60 + better.var(0) / 60).sqrt()
    assert ((plain.mean(0) - better.mean(0)).abs() <= 5 * error + 1e-6).all()
    assert better.var(0).sum() < 0.5 * plain.var(0).sum()


# --- stopping early


def test_settled_rows_stop_and_the_others_go_on(model):
    """Rows whose probabilities hardly move take 4 of 16 draws; what they had counts as often as in all."""
    posterior = gaussian(model, scale=0.03)
    full = posterior.drawn(16, seeded(), Drawing())
    early = posterior.drawn(16, seeded(), Drawing(tolerance=0.03))
    with torch.no_grad():
        whole, found = full.logits(model, BATCH, class_logits), early.logits(model, BATCH, class_logits)
    assert found.shape == whole.shape
    assert 4 * len(ROWS) <= early.passes < full.passes == 16 * len(ROWS)
    for row in range(len(ROWS)):
        stops = [n for n in (4, 8, 16) if torch.allclose(found[:, row], whole[:n, row].repeat(16 // n, 1), atol=2e-5)]
        stop = min(stops)
        probs = whole[:stop, row].double().softmax(-1)
        assert (probs.std(0) / math.sqrt(stop)).max() <= 0.03 or stop == 16
        average = found[:, row].double().softmax(-1).mean(0)
        torch.testing.assert_close(average, probs.mean(0), rtol=1e-4, atol=1e-5)
    assert len({float(found[:4, row].std()) for row in range(len(ROWS))}) > 1


def test_rows_of_which_none_settles_take_all_draws(model):
    posterior = gaussian(model)
    drawn = posterior.drawn(8, seeded(), Drawing(tolerance=1e-9))
    with torch.no_grad():
        found = drawn.logits(model, BATCH, class_logits)
    torch.testing.assert_close(found, logits(model, posterior, LOOP, n=8), rtol=2e-5, atol=2e-5)
    assert drawn.passes == 8 * len(ROWS)


def test_settled_needs_a_lead_and_a_small_error():
    sure = torch.tensor([[4.0, 0.0]]).repeat(4, 1, 1)
    ahead = torch.tensor([[[0.16, 0.0]], [[0.0, 0.1]], [[0.16, 0.0]], [[0.0, 0.02]]])  # by 1.2 standard errors
    torn = torch.tensor([[[0.01, 0.0]], [[0.0, 0.01]], [[0.01, 0.0]], [[0.0, 0.01]]])
    wide = torch.tensor([[[4.0, 0.0]], [[0.5, 0.0]], [[4.0, 0.0]], [[0.5, 0.0]]])
    broken = torch.tensor([[4.0, torch.nan]]).repeat(4, 1, 1)
    logits = torch.cat([sure, torn, wide, broken, ahead], 1)
    assert stack.settled(logits, 0.05).tolist() == [True, False, False, False, False]


def test_the_lead_has_to_be_more_than_two_of_its_standard_errors():
    wider, ratios = 1 / math.sqrt(scipy.stats.chi2.ppf(0.05, 7) / 7), []
    for center in torch.linspace(0.1, 1.0, 40).tolist():
        apart = torch.tensor([0.5, -0.5] * 4)
        lead = (2 * (center + wider * apart).double().sigmoid() - 1).numpy()
        ratio = lead.mean() / (lead.std(ddof=1) / math.sqrt(8))
        if abs(ratio - 2) > 0.1:  # the quantile is known to some per cent
            ratios.append(ratio)
            logits = torch.stack([center + apart, torch.zeros(8)], 1)[:, None]
            assert stack.settled(logits, 1.0).item() == (ratio > 2)
    assert any(1.7 < ratio < 2 for ratio in ratios)
    assert any(2 < ratio < 2.3 for ratio in ratios)


def test_rows_are_looked_at_from_four_draws_on_or_four_pairs():
    assert Drawing(tolerance=0.01).stops(16) == [4, 8, 16]
    assert Drawing(tolerance=0.01, noise="antithetic").stops(16) == [8, 16]
    assert Drawing(tolerance=0.01, noise="antithetic").stops(36) == [12, 18, 36]


def test_mirrored_draws_are_judged_by_pairs():
    """Their average hardly moves, which single draws do not show; and where both of a pair are the same, it does."""
    swing = torch.tensor([[2.0, 0.0], [1.0, 0.0]]).repeat(4, 1)[:, None]  # (8, 1, 2): up and down
    assert not stack.settled(swing, 0.02).item()
    assert stack.settled(swing, 0.02, paired=True).item()
    twice = torch.tensor([[4.0, 0.0], [4.0, 0.0], [3.0, 0.0], [3.0, 0.0]]).repeat(2, 1)[:, None]
    wider = 3.5 + 0.5 / math.sqrt(scipy.stats.chi2.ppf(0.05, 3) / 3)  # of four pairs, with three degrees of freedom
    probs = torch.tensor([[wider, 0.0], [7 - wider, 0.0]]).double().softmax(-1)[:, 0].repeat(2)
    error = probs.std() / 2
    assert not stack.settled(twice, float(error) * 0.9, paired=True).item()
    assert stack.settled(twice, float(error) * 1.1, paired=True).item()


@pytest.mark.parametrize(("center", "spread"), [(4, 4), (2, 2), (1, 0.5), (1, 0.1), (6, 1)])
@pytest.mark.parametrize(("draws", "tolerance"), [(64, 0.01), (64, 0.03), (16, 0.03)])
def test_an_early_stop_is_off_by_no_more_than_promised(center: float, spread: float, draws: int, tolerance: float):
    """Of all rows together there is next to no bias: rows do not stop where draws happen to agree."""
    one, rows = nn.Linear(1, 1, bias=False), 4000
    weights = torch.arange(float(draws)).split(1)

    def forward(model: nn.Module, which: Tensor) -> Tensor:
        of_draw = all_logits[int(model.weight), which[:, 0]]
        return torch.stack([of_draw, torch.zeros_like(of_draw)], 1)

    all_logits = center + spread * torch.randn(draws, rows, generator=seeded())
    how = Drawing(stacked=False, tolerance=tolerance)
    drawn = stack.Stack([{"weight": w[:, None]} for w in weights], mean={"weight": torch.zeros(1, 1)}, how=how)
    with torch.no_grad():
        found = drawn.logits(one, torch.arange(rows)[:, None], forward).double().softmax(-1)[..., 0].mean(0)
    off = found - all_logits.double().sigmoid().mean(0)
    # With sigma 4 logits of few draws hardly show how far apart they are: an error of 0.017 where 0.01 is promised.
    assert off.square().mean().sqrt() < max(tolerance, 0.018 if spread == 4 else tolerance)
    assert off.mean().abs() < 0.006


@pytest.mark.parametrize("noise", ["independent", "antithetic"])
def test_a_row_may_settle_on_the_way(model, noise):
    """At 8 of 16 draws: neither at the first stop nor never."""
    posterior, how = gaussian(model, scale=0.1), Drawing(noise=noise)
    whole = logits(model, posterior, how, n=32)
    least, stop, paired = (4, 8, False) if noise == "independent" else (8, 16, True)
    found = 0
    for tolerance in (0.01, 0.02, 0.03, 0.05, 0.1):
        early = logits(model, posterior, Drawing(noise=noise, tolerance=tolerance), n=32)
        at = stack.settled(whole[:stop], tolerance, paired) & ~stack.settled(whole[:least], tolerance, paired)
        for row in at.nonzero()[:, 0].tolist():
            found += 1
            expected = whole[:stop, row].repeat(32 // stop, 1)
            torch.testing.assert_close(early[:, row], expected, rtol=2e-5, atol=2e-5)
    assert found
    assert not stack.settled(whole[:4], 0.005).all()


def test_members_of_a_mixture_settle_by_themselves(model):
    """Each keeps its share, however early one of them stops."""
    quiet, loud = gaussian(model, scale=0.01), gaussian(model, seed=7, scale=0.5)
    drawn = Mixture([quiet, loud]).drawn(32, seeded(), Drawing(tolerance=0.02))
    with torch.no_grad():
        found = drawn.logits(model, BATCH, class_logits)
    assert len(found) == 32
    assert drawn.passes < 32 * len(ROWS)
    made = [[len(found[start::2, row].unique(dim=0)) for row in range(len(ROWS))] for start in (0, 1)]
    assert min(made[0]) == 4
    assert min(made[1]) > 4
    assert drawn.how.tolerance == 0.02


@pytest.mark.parametrize("temperature", [0.2, 5.0])
def test_draws_stop_by_the_probabilities_that_are_returned(temperature, model):
    """Those at the temperature, and not by those before it."""

    def divided(model, batch):
        return class_logits(model, batch) / temperature

    inner, how = gaussian(model, scale=0.05), Drawing(tolerance=0.02)
    tempered, alone, by_hand = (
        posterior.drawn(64, seeded(), how) for posterior in (Tempered(inner, temperature, 1.0), inner, inner)
    )
    with torch.no_grad():
        found = tempered.logits(model, BATCH, class_logits)
        alone.logits(model, BATCH, class_logits)
        torch.testing.assert_close(found, by_hand.logits(model, BATCH, divided), rtol=1e-4, atol=1e-5)
    assert tempered.passes == by_hand.passes != alone.passes


def test_a_mixture_within_one_loses_no_member(model):
    points = [Point(random_like(model, 0.3, seed)) for seed in range(3)]
    nested = Mixture([Mixture(points[:2]), points[2]])
    found = logits(model, nested, PLAIN, n=2)
    alone = [logits(model, one, LOOP)[0] for one in points]
    torch.testing.assert_close(found, torch.stack([alone[0], alone[2], alone[1], alone[2]]), rtol=2e-5, atol=2e-5)


def test_predictions_say_how_they_were_made(model):
    how = Drawing(noise="antithetic", last_layers=1, tolerance=0.05)
    found = predict(model, gaussian(model), ROWS, pad_token_id=0, samples=8, how=how)
    assert {k: found.meta[k] for k in ("noise", "last_layers", "tolerance")} == {
        "noise": "antithetic",
        "last_layers": "1",
        "tolerance": "0.05",
    }
    assert 4 <= float(found.meta["passes_a_row"]) <= 8
    linear = predict(model, Linearised(gaussian(model)), ROWS, pad_token_id=0, samples=8, how=how)
    assert not {"noise", "last_layers", "tolerance", "passes_a_row"} & set(linear.meta)  # none of it was done
    plain = predict(model, gaussian(model), ROWS, pad_token_id=0, samples=8)
    assert not {"noise", "last_layers", "tolerance", "passes_a_row"} & set(plain.meta)


def test_wrong_settings_are_told_together():
    with pytest.raises(ConfigError) as caught:
        Drawing(noise="sobol", last_layers=0, tolerance=2.0, tokens=0)  # type: ignore[arg-type]
    for name in ("noise", "last_layers", "tolerance", "tokens"):
        assert f"`{name}`" in str(caught.value)
    outside = DiagonalGaussian(
        {"layers.1.w.weight": torch.ones(1, 1)} | {"head.weight": torch.ones(1, 1)},
        {"layers.1.w.weight": torch.ones(1, 1), "head.weight": torch.ones(1, 1)},
    )
    with pytest.raises(VarloraError, match=r"`head\.weight` lies outside"):
        outside.drawn(2, seeded(), Drawing(last_layers=1))
    with pytest.raises(VarloraError, match="number of draws >= 1"):
        Point({"w": torch.ones(1)}).drawn(0, seeded())
