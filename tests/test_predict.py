from __future__ import annotations

import math
import random
from contextlib import contextmanager
from dataclasses import replace

import helpers
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from varlora.checkpoint import save_adapter
from varlora.data import collate
from varlora.demo.run import one_thread
from varlora.drawing import Drawing
from varlora.errors import DamagedFileError, VarloraError
from varlora.files import save_tensors
from varlora.model import LoRA, load_model
from varlora.params import copied, swapped, trainable
from varlora.posterior import DiagonalGaussian, Mixture, Point, Tempered
from varlora.predict import Predictor, predict
from varlora.predictions import Predictions, load_predictions, save_predictions
from varlora.prompt import Encoded

ROWS = helpers.make_rows(11, seed=2)
S, N, C = 4, 11, 5


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def model():
    return helpers.tiny_model(dropout=0.1)


@pytest.fixture(scope="module")
def posterior(model):
    generator = torch.Generator().manual_seed(0)
    mean = {name: torch.randn(p.shape, generator=generator) * 0.3 for name, p in trainable(model).items()}
    return DiagonalGaussian(mean, {name: torch.full_like(value, 0.2) for name, value in mean.items()})


def run(model, posterior, rows=ROWS, **settings):
    return predict(model, posterior, rows, pad_token_id=0, **{"samples": S, **settings})


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# --- draws ---


def test_shapes_labels_and_ids(model, posterior):
    found = run(model, posterior)
    assert found.logits.shape == (S, N, C)
    assert found.logits.dtype == torch.float32
    assert found.logits_mean.shape == (N, C)
    assert found.labels.tolist() == [row.label for row in ROWS]
    assert found.ids == tuple(row.id for row in ROWS)
    assert found.meta == {"samples": "4", "tau": "1.0", "seed": "0"}


@pytest.mark.parametrize("budget", [1, 20, 10**6])
def test_draws_are_fixed_models_whatever_the_batches(model, posterior, budget):
    """Row by row, some rows together, or all of them: draw s is one model, the one that the seed gives."""
    found = run(model, posterior, token_budget=budget, seed=5)
    generator = torch.Generator().manual_seed(5)
    for draw in range(S):
        with swapped(model, posterior.draw(generator)):
            alone = run(model, Point(helpers.bits(model)), token_budget=1)
        close(found.logits[draw], alone.logits_mean)
    assert (found.logits[0] - found.logits[1])[found.logits[0].isfinite()].abs().max() > 0.1


FULL = torch.OutOfMemoryError("CUDA out of memory")


@contextmanager
def little_memory(model, tokens, error=FULL):
    """Within the context, the last block has no memory for more tokens; yield the tokens of each pass that failed."""
    failed = []

    def check(layer, args):
        rows, width, _ = args[0].shape
        if rows * width > tokens:
            failed.append(rows * width)
            raise error

    (last,) = (part for name, part in model.named_modules() if name.endswith("layers.1.input_layernorm"))
    hook = last.register_forward_pre_hook(check)
    try:
        yield failed
    finally:
        hook.remove()


ALIKE = [replace(row, input_ids=tuple(range(5, 17)) + row.input_ids) for row in ROWS]


@pytest.mark.parametrize("how", [{}, {"stacked": False}, {"last_layers": 1}, {"tolerance": 0.2}], ids=str)
@pytest.mark.parametrize("rows", [ROWS, ALIKE], ids=["rows", "rows that begin alike"])
def test_where_memory_runs_out_for_one_draw_half_as_many_rows_go_on(model, posterior, rows, how):
    """With the same probabilities, and what there is room for is found out once."""
    predictor, whole = (Predictor(model, posterior, samples=8, how=Drawing(**how)) for _ in range(2))
    expected, done = whole.predictions(rows, pad_token_id=0), []
    with little_memory(model, 2 * max(len(row.input_ids) for row in rows)) as failed:
        found = predictor.predictions(rows, pad_token_id=0, progress=done.append)
        assert failed
        failed.clear()
        again = predictor.logits_of(rows, pad_token_id=0)
        assert not failed
    close(found.probs, expected.probs)
    close(found.logits, expected.logits)
    close(found.logits_mean, expected.logits_mean)
    close(again, expected.logits)
    assert sum(done) == N


def test_later_batches_are_no_larger_than_there_was_room_for(model, posterior):
    longest, budget = max(len(row.input_ids) for row in ROWS), 50
    with little_memory(model, 2 * longest) as failed:
        found = run(model, posterior, token_budget=budget, how=Drawing(stacked=False))
    assert failed == [5 * longest, 3 * longest]
    assert budget // longest == 5 < N
    close(found.logits, run(model, posterior).logits)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("error", [FULL, RuntimeError("can't allocate memory")], ids=["on a GPU", "on a CPU"])
def test_where_not_even_one_row_has_room_the_error_is_told(model, posterior, error, stacked):
    how, longest = Drawing(stacked=stacked), max(len(row.input_ids) for row in ROWS)
    with little_memory(model, 0, error) as failed, pytest.raises(type(error), match="memory"):
        run(model, posterior, how=how)
    if not stacked:
        assert failed == [count * longest for count in (11, 6, 3, 2, 1)]
    with little_memory(model, 0, RuntimeError("something else")) as failed, pytest.raises(RuntimeError, match="else"):
        run(model, posterior, how=how)
    assert failed == [N * longest]


def test_results_follow_the_rows(model, posterior):
    order = random.Random(0).sample(range(N), N)
    found, shuffled = run(model, posterior), run(model, posterior, [ROWS[i] for i in order], token_budget=30)
    close(shuffled.logits, found.logits[:, order])
    close(shuffled.logits_mean, found.logits_mean[order])
    assert shuffled.ids == tuple(found.ids[i] for i in order)
    assert torch.equal(shuffled.labels, found.labels[order])


def test_more_draws_begin_with_the_same(model, posterior):
    assert torch.equal(run(model, posterior, samples=6).logits[:2], run(model, posterior, samples=2).logits)


def test_the_seed_decides_and_the_global_state_does_not(model, posterior):
    found = run(model, posterior)
    torch.manual_seed(77)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(run(model, posterior).logits, found.logits)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]  # noqa: NPY002
    other = run(model, posterior, seed=1)
    assert not torch.equal(other.logits, found.logits)
    assert torch.equal(other.logits_mean, found.logits_mean)


def test_no_draws_is_the_mean(model, posterior):
    found = run(model, posterior, samples=0)
    assert torch.equal(found.logits, found.logits_mean[None])
    with posterior.at_mean(model):
        close(found.logits_mean, run(model, Point(helpers.bits(model)), token_budget=1).logits[0])
    assert found.meta["samples"] == "0"


def test_point_has_one_draw_and_a_mixture_takes_turns(model, posterior):
    assert run(model, Point(posterior.mean)).logits.shape == (1, N, C)
    other = Point({name: value + 0.1 for name, value in posterior.mean.items()})
    found = run(model, Mixture([Point(posterior.mean), other]))
    assert found.logits.shape == (S, N, C)
    assert torch.equal(found.logits[0], found.logits[2])
    assert not torch.equal(found.logits[0], found.logits[1])
    close(found.probs, found.probs_mean)


def test_the_mean_goes_on_from_what_rows_begin_with(model, posterior):
    """Batch after batch, as its draws do; the members of a mixture are different models, and run whole."""
    start = tuple(range(5, 17))
    one, other = ([replace(row, input_ids=start + row.input_ids) for row in rows] for rows in (ROWS[:5], ROWS[5:6]))
    another = Point({name: value + 0.3 for name, value in posterior.mean.items()})
    model.eval()
    layer = next(part for name, part in model.named_modules() if name.endswith("layers.0.mlp"))
    for of in (posterior, Point(posterior.mean), Tempered(posterior, 2.0, 2.0), Mixture([posterior, another])):
        predictor, whole = Predictor(model, of, samples=0), Predictor(model, of, samples=0, how=Drawing(stacked=False))
        seen = []
        hook = layer.register_forward_hook(lambda layer, args, output: seen.append(tuple(args[0].shape[:2])))  # noqa: B023
        found = [predictor.at_mean(collate(rows, 0)) for rows in (one, other, one)]
        hook.remove()
        longest = max(len(row.input_ids) for row in ROWS[:5])
        if isinstance(of, Mixture):
            assert {width for _, width in seen} == {12 + longest, 12 + len(ROWS[5].input_ids)}
        else:
            assert seen == [(1, 12), (5, longest), (1, len(ROWS[5].input_ids)), (5, longest)]
        for rows, logits in zip((one, other, one), found):
            close(logits, whole.at_mean(collate(rows, 0)))


@pytest.mark.parametrize("alike", [True, False], ids=["within what rows begin with", "at their ends"])
def test_an_adapter_that_tokens_turn_on_sees_them(alike):
    """Activated LoRA looks for its tokens in all that a pass is given."""
    base = helpers.tiny_model().unload()
    torch.manual_seed(0)
    start, tokens = tuple(range(3, 11)), (38, 39)
    made = {"r": 4, "target_modules": ["q_proj"], "alora_invocation_tokens": [*tokens], "init_lora_weights": False}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **made)).eval()
    ids = [(*start[:4], *tokens, *start[4:], 20 + i) if alike else (*start, 20 + i, *tokens, 7) for i in range(8)]
    rows = [Encoded(str(i), of, (40, 41, 42), 0, False) for i, of in enumerate(ids)]
    whole, found = (
        predict(model, Point(copied(model)), rows, pad_token_id=0, samples=0, how=Drawing(stacked=stacked))
        for stacked in (False, True)
    )
    close(found.probs, whole.probs)


def beginning_alike(*rows):
    return collate([replace(row, input_ids=tuple(range(5, 17)) + row.input_ids) for row in rows], 0)


@torch.no_grad()
@pytest.mark.parametrize("change", ["frozen weights", "autocast", "model"])
def test_what_is_kept_is_made_anew_where_the_model_is_another(posterior, change):
    model = helpers.tiny_model(dropout=0.1).eval()
    kept, whole = Predictor(model, posterior, S), Predictor(model, posterior, S, how=Drawing(stacked=False))
    batches = [beginning_alike(*ROWS[start : start + 3]) for start in (0, 3, 6)]

    def both(predictor, batch, dtype):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            return torch.cat([predictor.at_mean(batch), predictor.logits(batch)]).float()

    dtype = torch.bfloat16 if change == "autocast" else None
    for batch in batches[:2]:
        both(kept, batch, dtype)
    if change == "frozen weights":
        for p in model.parameters():
            if not p.requires_grad:
                p.mul_(1.3)
    elif change == "model":
        kept.model = whole.model = other = helpers.tiny_model(dropout=0.1).eval()
        other.get_input_embeddings().weight.add_(0.5)
    if change == "autocast":
        dtype, whole = torch.float16, Predictor(model, posterior, S)
        both(whole, batches[1], dtype)
    found, expected = both(kept, batches[2], dtype), both(whole, batches[2], dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_adapters_that_draws_do_not_reach_are_refused(posterior):
    model = helpers.tiny_model(dropout=0.1).eval()
    model.merge_adapter()
    with pytest.raises(VarloraError, match="unmerge_adapter"):
        run(model, posterior)
    model.unmerge_adapter()
    run(model, posterior)
    model.requires_grad_(False)
    with pytest.raises(VarloraError, match="is_trainable=True"):
        run(model, posterior)


def test_tau_scales_the_variance(model, posterior):
    """At τ the draws are those of τ times the variance; at 0 all are the mean."""
    wider = DiagonalGaussian(posterior.mean, {name: 2 * std for name, std in posterior.std.items()})
    found = run(model, posterior, tau=4)
    close(found.logits, run(model, wider).logits)
    assert found.meta["tau"] == "4.0"
    none = run(model, posterior, tau=0)
    for draw in none.logits:
        close(draw, none.logits_mean)
    spread = [run(model, posterior, tau=tau).uncertainty.epistemic.mean().item() for tau in (0, 0.01, 1)]
    assert abs(spread[0]) < 1e-9
    assert spread[1] < spread[2]


def test_probabilities_are_averaged_never_logits(model, posterior):
    found = run(model, posterior)
    by_hand = found.logits.double().softmax(-1).mean(0)
    torch.testing.assert_close(found.probs, by_hand, rtol=0, atol=1e-12)
    assert (found.probs - found.logits.double().mean(0).softmax(-1)).abs().max() > 1e-3
    torch.testing.assert_close(found.probs.sum(-1), torch.ones(N, dtype=torch.float64), rtol=0, atol=1e-12)


def test_rows_without_an_answer_have_probability_zero_there(model, posterior):
    found = run(model, posterior)
    for i, row in enumerate(ROWS):
        count = len(row.label_tokens)
        assert found.logits[:, i, :count].isfinite().all()
        assert (found.logits[:, i, count:] == -math.inf).all()
        assert (found.probs[i, count:] == 0).all()
    two = run(model, posterior, [row for row in ROWS if len(row.label_tokens) == 2])
    assert two.logits.shape[-1] == 2


def test_uncertainty_of_each_row(model, posterior):
    total, aleatoric, epistemic = run(model, posterior).uncertainty
    assert total.shape == aleatoric.shape == epistemic.shape == (N,)
    torch.testing.assert_close(total, aleatoric + epistemic)
    assert (epistemic > 0).all()
    assert (total <= torch.tensor([math.log(len(row.label_tokens)) for row in ROWS]) + 1e-9).all()


def test_unknown_labels_are_minus_one(model, posterior):
    found = run(model, posterior, helpers.make_rows(3, labelled=False))
    assert found.labels.tolist() == [-1, -1, -1]


# --- what is left behind ---


def test_model_is_left_as_it_was(model, posterior):
    before = helpers.bits(model)
    model.train()
    frozen = next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp"))
    frozen.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    found = run(model, posterior)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert helpers.same(helpers.bits(model), before)
    model.eval()
    assert torch.equal(run(model, posterior).logits, found.logits)  # so there was no dropout
    assert not model.training
    assert all(p.grad is None and not p.is_inference() for p in model.parameters())


def test_model_is_left_as_it_was_after_an_error(model, posterior):
    before = helpers.bits(model)
    model.train()
    bad = [*ROWS, Encoded("bad", (10**6,), (40, 41), 0, False)]
    with pytest.raises(IndexError):
        run(model, posterior, bad)
    assert model.training
    assert helpers.same(helpers.bits(model), before)
    model.eval()


def test_progress_counts_the_rows(model, posterior):
    done: list[int] = []
    run(model, posterior, token_budget=20, progress=done.append)
    assert len(done) > 1
    assert sum(done) == N


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": []}, "`rows`"),
        ({"samples": -1}, "`samples`.*-1"),
        ({"tau": -0.5}, "`tau`.*-0.5"),
        ({"tau": math.nan}, "`tau`.*nan"),
        ({"token_budget": 0}, "`budget`.*0"),
    ],
)
def test_wrong_arguments_are_named(model, posterior, change, words):
    with pytest.raises(VarloraError, match=words):
        run(model, posterior, **change)


def test_posterior_of_another_model_is_refused(model, posterior):
    with pytest.raises(DamagedFileError, match="lora_A"):
        run(helpers.tiny_model(rank=2), posterior)


def test_real_model_with_a_real_tokenizer(shared, tmp_path):
    """Nothing here hangs on how tiny the model is: on trained weights, draws spread around the mean."""
    model, tokenizer = load_model(shared / "models" / "stories-260k", lora=LoRA(), device="cpu")
    tokens = tokenizer.convert_tokens_to_ids(["▁a", "▁the"])
    rows = [
        Encoded(text, tuple(tokenizer(text)["input_ids"]), tuple(tokens), None, False)
        for text in ("Once upon a time there was", "Tom saw", "One day, Lily went to play in")
    ]
    generator = torch.Generator().manual_seed(0)
    mean = {name: torch.randn(p.shape, generator=generator) * 0.02 for name, p in trainable(model).items()}
    posterior = DiagonalGaussian(mean, {name: torch.full_like(value, 0.02) for name, value in mean.items()})
    found = predict(model, posterior, rows, pad_token_id=tokenizer.pad_token_id, samples=8)
    alone = predict(model, posterior, rows, pad_token_id=tokenizer.pad_token_id, samples=8, token_budget=1)
    close(found.logits, alone.logits)
    spread = found.logits.std(0)
    assert (spread > 0).all()
    assert ((found.logits.mean(0) - found.logits_mean).abs() < 3 * spread).all()
    save_adapter(model, posterior, tmp_path / "adapter")


# --- files ---


def test_predictions_come_back_bit_for_bit(model, posterior, tmp_path):
    found = run(model, posterior)
    found = replace(found, meta={**found.meta, "task": "boolq"}, ids=("ü", *found.ids[1:]))
    save_predictions(found, tmp_path / "predictions.safetensors")
    loaded = load_predictions(tmp_path / "predictions.safetensors")
    assert torch.equal(loaded.logits, found.logits)
    assert torch.equal(loaded.logits_mean, found.logits_mean)
    assert torch.equal(loaded.labels, found.labels)
    assert torch.equal(loaded.probs, found.probs)
    assert loaded.ids == found.ids
    assert loaded.meta == found.meta
    with safe_open(tmp_path / "predictions.safetensors", "pt") as file:
        assert set(file.keys()) == {"logits", "logits_mean", "mask", "labels"}
        assert file.get_tensor("mask").sum(-1).tolist() == [len(row.label_tokens) for row in ROWS]


def test_texts_of_the_rows_come_back(model, posterior, tmp_path):
    found = run(model, posterior)
    prompts = tuple(f"Is “{row.id}” right?\nAnswer:" for row in ROWS)
    answers = tuple(tuple("ABCDEFGH"[: len(row.label_tokens)]) for row in ROWS)
    save_predictions(replace(found, prompts=prompts, answers=answers), tmp_path / "x.safetensors")
    loaded = load_predictions(tmp_path / "x.safetensors")
    assert (loaded.prompts, loaded.answers) == (prompts, answers)
    assert loaded.meta == found.meta


def test_files_of_older_versions_have_no_texts(tmp_path):
    save_tensors(tmp_path / "x.safetensors", tensors_of(), {"ids": '["a", "b", "c"]', "task": "boolq"})
    loaded = load_predictions(tmp_path / "x.safetensors")
    assert (loaded.slices, loaded.prompts, loaded.answers) == ((), (), ())
    assert loaded.meta == {"task": "boolq"}


def test_what_is_written_can_be_read_whatever_torchs_default_type_is(model, posterior, tmp_path):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = run(model, posterior)
    finally:
        torch.set_default_dtype(before)
    save_predictions(found, tmp_path / "x.safetensors")
    assert load_predictions(tmp_path / "x.safetensors").logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"prompts": '["one"]'}, "3 rows and 1 prompts"),
        ({"answers": '[["yes", "no"]]'}, "3 rows and 1 lists of answers"),
        ({"answers": '[["yes", "no"], ["yes", "no"], ["yes"]]'}, "another number of answers"),
        ({"answers": "[1, 2, 3]"}, "its answers are no lists"),
        ({"prompts": '["on'}, "unreadable"),
    ],
)
def test_texts_that_do_not_fit_the_rows_are_refused(tmp_path, texts, words):
    save_tensors(tmp_path / "x.safetensors", tensors_of(), {"ids": '["a", "b", "c"]', **texts})
    with pytest.raises(DamagedFileError, match=rf"x\.safetensors.*{words}.*varlora evaluate"):
        load_predictions(tmp_path / "x.safetensors")


def tensors_of(logits=None, mean=None, mask=None, labels=None):
    return {
        "logits": torch.zeros(2, 3, 2) if logits is None else logits,
        "logits_mean": torch.zeros(3, 2) if mean is None else mean,
        "mask": torch.ones(3, 2, dtype=torch.bool) if mask is None else mask,
        "labels": torch.tensor([0, 1, -1]) if labels is None else labels,
    }


@pytest.mark.parametrize(
    ("tensors", "ids", "words"),
    [
        ({"logits": torch.zeros(1)}, "[]", "logits_mean"),
        (tensors_of(logits=torch.zeros(2, 3, 4)), '["a", "b", "c"]', "shapes"),
        (tensors_of(labels=torch.tensor([0])), '["a", "b", "c"]', "3 rows and 1 labels"),
        (tensors_of(), '["a"]', "3 rows and 1 ids"),
        (tensors_of(), '["a", ', "unreadable"),
        (tensors_of(), None, "ids"),
        (tensors_of(logits=torch.full((2, 3, 2), math.nan)), '["a", "b", "c"]', "not finite"),
        (tensors_of(mask=torch.tensor([[True, False]] * 3)), '["a", "b", "c"]', "not finite"),
        (tensors_of(labels=torch.tensor([0, 2, -1])), '["a", "b", "c"]', "label"),
    ],
)
def test_file_that_does_not_hold_predictions_is_named(tmp_path, tensors, ids, words):
    save_tensors(tmp_path / "x.safetensors", tensors, None if ids is None else {"ids": ids})
    with pytest.raises(DamagedFileError, match=rf"x\.safetensors.*{words}"):
        load_predictions(tmp_path / "x.safetensors")


def test_predictions_cut_short_are_named(tmp_path):
    save_predictions(
        Predictions(torch.zeros(1, 2, 2), torch.zeros(2, 2), torch.tensor([0, 1]), ("a", "b")),
        tmp_path / "x.safetensors",
    )
    content = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(content[:-3])
    with pytest.raises(DamagedFileError, match=r"x\.safetensors"):
        load_predictions(tmp_path / "x.safetensors")
    with pytest.raises(DamagedFileError, match="absent"):
        load_predictions(tmp_path / "y.safetensors")
