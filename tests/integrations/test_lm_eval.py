"""A posterior in lm-evaluation-harness, against the harness's own model class on the same adapter and each draw's."""

from __future__ import annotations

import json
import math
import runpy
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import bits, same

import varlora
from varlora.config import settings_from, settings_of
from varlora.errors import VarloraError
from varlora.evaluation import calibrate
from varlora.integrations import lm_eval as ours
from varlora.integrations.lm_eval_calibration import calibration_of, choices_of
from varlora.loading import Loaded, load
from varlora.posterior import Linearised, Mixture, Point
from varlora.predictions import load_predictions
from varlora.tasks import get_task, load_rows
from varlora.training import train

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install varlora[lm-eval]")
datasets = pytest.importorskip("datasets")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

ASSETS = Path(__file__).parents[1] / "assets"
CHOICES, LETTERS, ENDINGS, TEXTS, ANSWERS = (
    f"varlora_{name}" for name in ("choices", "letters", "endings", "texts", "answers")
)
S = 3


def silent(words: str) -> None:
    pass


@pytest.fixture(autouse=True, scope="module")
def offline(tmp_path_factory):
    """No network, no cache outside, and a model this small gains nothing from threads.

    Nor does each evaluation ask pip what is installed, which takes a second: the harness writes it beside results.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    cache = tmp_path_factory.mktemp("cache")
    for name, value in {"HF_DATASETS_CACHE": cache, "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}.items():
        patch.setenv(name, str(value))
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)  # read from the environment at import
    patch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    patch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "not asked for")
    yield
    patch.undo()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """The harness's tasks on our rows, with paths that exist here."""
    folder = tmp_path_factory.mktemp("tasks")
    for path in (ASSETS / "lm_eval").iterdir():
        (folder / path.name).write_text(path.read_text().replace("FOLDER", str(folder)))
    return folder


@pytest.fixture(scope="module")
def trained(bundled, tmp_path_factory):
    """Train a run of three steps by a method, once."""
    folder = tmp_path_factory.mktemp("runs")

    def run(method: str, name: str = "", **settings) -> Path:
        run_dir = folder / (name or method)
        if not run_dir.is_dir():
            base = {"task": "boolq", "model": str(bundled), "data_dir": str(ASSETS), "calibration_fraction": 0.0}
            common = {**base, "steps": 3, "method": method, "run_dir": str(run_dir)}
            train(settings_from({**common, **settings}), say=silent)
        return run_dir

    return run


@pytest.fixture(scope="module")
def ivon_run(trained) -> Path:
    """A run whose draws differ much."""
    return trained("ivon", method_settings={"lr": 0.1, "ess": 1e3, "hess_init": 0.1})


@pytest.fixture(scope="module")
def loaded(ivon_run) -> Loaded:
    return load(ivon_run)


@pytest.fixture(scope="module")
def evaluated(tasks):
    """Evaluate a model by the harness on some of the tasks."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)

    def evaluate(model, *names: str, **settings):
        return lm_eval.simple_evaluate(
            model, tasks=list(names), task_manager=manager, log_samples=True, bootstrap_iters=0, **settings
        )

    return evaluate


def scores(results, task: str) -> dict[str, float]:
    return {name: value for name, value in results["results"][task].items() if isinstance(value, float)}


def answers(results, task: str) -> list[list]:
    """Return what the model answered to each request, row by row."""
    return [sample["resps"] for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"])]


def lls(results, task: str) -> torch.Tensor:
    """Return the loglikelihood of each request, one after the other."""
    flat = [request[0] for row in answers(results, task) for request in row]
    return torch.tensor([one if isinstance(one, float) else one[0] for one in flat], dtype=torch.float64)


def harness(loaded: Loaded, folder: Path, weights=None, **settings) -> HFLM:
    """Return the harness's own model, with an adapter read from a folder by peft."""
    if weights is not None:
        with Point(weights).at_mean(loaded.model):
            loaded.model.save_pretrained(folder)
    return HFLM(loaded.settings.model, peft=str(folder), dtype="float32", device="cpu", batch_size=4, **settings)


@pytest.fixture(scope="module")
def draws(loaded, evaluated, tmp_path_factory):
    """What the harness itself finds for each of S draws, each with its weights in an adapter of its own."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(S):
        folder = tmp_path_factory.mktemp("draw")
        model = harness(loaded, folder, loaded.posterior.draw(generator))
        found.append(evaluated(model, CHOICES, LETTERS, ENDINGS, TEXTS))
    return found


@pytest.fixture(scope="module")
def averaged(loaded, evaluated):
    """What the harness finds for the average of those draws."""
    return evaluated(ours.VarloraLM(loaded, samples=S, batch_size=4, say=silent), CHOICES, LETTERS, ENDINGS, TEXTS)


@pytest.mark.parametrize("samples", [0, 10])
def test_a_point_is_what_the_harness_finds_for_the_plain_adapter(trained, evaluated, samples):
    run = trained("adamw")
    names = (CHOICES, LETTERS, ENDINGS, TEXTS, ANSWERS)
    plain = evaluated(harness(load(run), run / "adapter"), *names)
    of_run = evaluated(ours.VarloraLM(run, samples=samples, batch_size=4), *names)
    for name in names:
        assert scores(of_run, name) == scores(plain, name)
        assert answers(of_run, name) == answers(plain, name)


def test_the_mean_is_what_the_harness_finds_for_the_adapter(ivon_run, evaluated):
    plain = evaluated(harness(load(ivon_run), ivon_run / "adapter"), CHOICES, ENDINGS, limit=4)
    at_mean = evaluated(ours.VarloraLM(ivon_run, samples=0, batch_size=4), CHOICES, ENDINGS, limit=4)
    for name in (CHOICES, ENDINGS):
        assert answers(at_mean, name) == answers(plain, name)


@pytest.mark.parametrize("task", [CHOICES, LETTERS, ENDINGS, TEXTS])
def test_loglikelihoods_are_averaged_in_probability(draws, averaged, task):
    each = torch.stack([lls(results, task) for results in draws])  # (S, requests)
    assert (each.std(0) > 1e-3).all()  # or there would be nothing to average
    expected = each.logsumexp(0) - math.log(S)
    torch.testing.assert_close(lls(averaged, task), expected, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(lls(averaged, task), each.mean(0), atol=1e-3)  # of logarithms


def greedy_by_the_book(loaded: Loaded, lm: HFLM, context: str, continuation: str) -> bool:
    """Whether each token has the largest p(y₍<t₎ v | x), by a pass of each draw over each beginning of the text."""
    x, y = lm._encode_pair(context, continuation)
    generator = torch.Generator().manual_seed(0)
    weights = [loaded.posterior.draw(generator) for _ in range(S)]
    for t, token in enumerate(y):
        total = torch.zeros(())
        for drawn in weights:
            with Point(drawn).at_mean(loaded.model), torch.no_grad():
                before = 1.0
                for at in range(t + 1):
                    probs = loaded.model(torch.tensor([x + y[:at]])).logits[0, -1].double().softmax(-1)
                    before, last = before * probs[y[at]], before * probs
            total = total + last
        if total.argmax() != token:
            return False
    return True


def continued(loaded: Loaded, lm: HFLM, context: str, tokens: int, weights) -> str:
    """Return what one model says next."""
    ids = lm.tok_encode(context)
    with Point(weights).at_mean(loaded.model), torch.no_grad():
        said = loaded.model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return lm.tokenizer.decode(said[0, len(ids) :])


def test_greedy_is_what_the_average_would_say(loaded):
    """Both answers occur, also where draws disagree."""
    lm = ours.VarloraLM(loaded, samples=S, batch_size=3, say=silent)
    generator = torch.Generator().manual_seed(0)
    weights = [loaded.posterior.draw(generator) for _ in range(S)]
    rows = [json.loads(line) for line in (ASSETS / "lm_eval" / "texts.jsonl").read_text().splitlines()]
    pairs = {
        (row["start"], continued(loaded, lm, row["start"], tokens, drawn))
        for row in rows
        for drawn in [*weights, loaded.posterior.mean]
        for tokens in (1, 3)
    }
    pairs = sorted(pair for pair in pairs if pair[1].strip())
    found = lm.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    expected = [greedy_by_the_book(loaded, lm, *pair) for pair in pairs]
    assert [is_greedy for _, is_greedy in found] == expected
    assert 0 < sum(expected) < len(expected)


def request(*arguments) -> Instance:
    return Instance(request_type="loglikelihood", doc={}, arguments=arguments, idx=0)


def test_the_size_of_a_batch_and_the_order_do_not_matter(loaded, averaged, evaluated):
    one = evaluated(ours.VarloraLM(loaded, samples=S, batch_size=1, say=silent), TEXTS, ENDINGS, LETTERS, CHOICES)
    automatic = ours.VarloraLM(loaded, samples=S, batch_size="auto", max_batch_size=8, say=silent)
    found = evaluated(automatic, LETTERS)
    assert automatic.batch_sizes == {0: 8}
    for name in (CHOICES, LETTERS, ENDINGS, TEXTS):
        torch.testing.assert_close(lls(one, name), lls(averaged, name), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(lls(found, LETTERS), lls(averaged, LETTERS), rtol=1e-5, atol=1e-4)


def test_a_seed_gives_the_same_numbers_and_another_one_others(loaded, averaged, evaluated):
    again = evaluated(ours.VarloraLM(loaded, samples=S, batch_size=4, say=silent), CHOICES, TEXTS)
    other = evaluated(ours.VarloraLM(loaded, samples=S, seed=1, batch_size=4, say=silent), CHOICES, TEXTS)
    for name in (CHOICES, TEXTS):
        assert torch.equal(lls(again, name), lls(averaged, name))
        assert ((lls(other, name) - lls(averaged, name)).abs() > 1e-4).all()


def test_the_model_is_afterwards_what_it_was(loaded, evaluated):
    before, modes = bits(loaded.model), [module.training for module in loaded.model.modules()]
    lm = ours.VarloraLM(loaded, samples=2, batch_size=4, say=silent)
    evaluated(lm, CHOICES, TEXTS, ANSWERS, limit=2)
    with pytest.raises(VarloraError):
        lm.loglikelihood([request("w", "w " * 10_000)], disable_tqdm=True)
    assert same(bits(loaded.model), before)
    assert [module.training for module in loaded.model.modules()] == modes


def test_a_draw_that_fails_leaves_the_model_as_it_was(loaded, monkeypatch):
    before = bits(loaded.model)
    lm = ours.VarloraLM(loaded, samples=2, say=silent)
    monkeypatch.setattr(lm, "_model_call", lambda inputs: torch.full((*inputs.shape, lm.vocab_size), math.nan))
    with pytest.raises(VarloraError, match=r"draws \[0, 1\] are no numbers"):
        lm.loglikelihood([request("a", " b")], disable_tqdm=True)
    with pytest.raises(VarloraError, match="are no numbers"):
        lm.loglikelihood_rolling([request("a b")], disable_tqdm=True)
    assert same(bits(loaded.model), before)


def test_one_model_that_overflows_is_an_error_too_and_in_no_cache(loaded, monkeypatch):
    kept = []
    lm = ours.VarloraLM(loaded, samples=0, say=silent)
    lm.set_cache_hook(SimpleNamespace(add_partial=lambda *one: kept.append(one)))
    found = lm.loglikelihood([request("a", " b")], disable_tqdm=True)
    assert kept == [("loglikelihood", ("a", " b"), found[0])]
    monkeypatch.setattr(lm, "_model_call", lambda inputs: torch.full((*inputs.shape, lm.vocab_size), math.nan))
    with pytest.raises(VarloraError, match="are no numbers"):
        lm.loglikelihood([request("a", " c")], disable_tqdm=True)
    assert len(kept) == 1


def test_texts_longer_than_the_context_are_read_in_windows_by_each_draw(loaded, evaluated, tmp_path):
    long = evaluated(ours.VarloraLM(loaded, samples=2, max_length=5, batch_size=3, say=silent), TEXTS, limit=2)
    generator = torch.Generator().manual_seed(0)
    each = []
    for index in range(2):
        model = harness(loaded, tmp_path / str(index), loaded.posterior.draw(generator), max_length=5)
        each.append(lls(evaluated(model, TEXTS, limit=2), TEXTS))
    expected = torch.stack(each).logsumexp(0) - math.log(2)
    torch.testing.assert_close(lls(long, TEXTS), expected, rtol=1e-5, atol=1e-4)


def test_a_context_that_is_too_long_is_cut_from_the_left_and_that_is_said(loaded):
    said: list[str] = []
    lm = ours.VarloraLM(loaded, samples=2, max_length=6, say=said.append)
    (cut,) = lm.loglikelihood([request("one two three four five six seven eight", " nine")], disable_tqdm=True)
    context, continuation = lm._encode_pair("one two three four five six seven eight", " nine")
    whole = lm._loglikelihood_tokens([(None, context[-(7 - len(continuation)) :], continuation)], disable_tqdm=True)
    assert [cut] == whole
    assert said == ["1 contexts were too long for 6 tokens and have been cut from the left."]


def test_requests_that_differ_in_their_last_token_share_a_pass(loaded, monkeypatch):
    lm = ours.VarloraLM(loaded, samples=2, batch_size=8, say=silent)
    call, shapes = lm._model_call, []
    monkeypatch.setattr(lm, "_model_call", lambda inputs: shapes.append(inputs.shape[0]) or call(inputs))
    together = lm.loglikelihood([request("Answer:", letter) for letter in (" A", " B", " C")], disable_tqdm=True)
    assert len({ll for ll, _ in together}) == 3
    grouped = shapes.copy()
    alone = [lm.loglikelihood([request("Answer:", letter)], disable_tqdm=True)[0] for letter in (" A", " B", " C")]
    assert sum(grouped) <= sum(shapes[len(grouped) :])
    torch.testing.assert_close(torch.tensor([ll for ll, _ in together]), torch.tensor([ll for ll, _ in alone]))


def test_a_mixtures_members_are_averaged_at_the_mean_too(loaded, evaluated, tmp_path):
    generator = torch.Generator().manual_seed(5)
    members = [Point(loaded.posterior.draw(generator)) for _ in range(2)]
    mixed = Loaded(loaded.model, Mixture(members), loaded.tokenizer, loaded.settings)
    each = [
        lls(evaluated(harness(loaded, tmp_path / str(i), member.mean), CHOICES, limit=3), CHOICES)
        for i, member in enumerate(members)
    ]
    expected = torch.stack(each).logsumexp(0) - math.log(2)
    said: list[str] = []
    for samples in (0, 1, 4):
        lm = ours.VarloraLM(mixed, samples=samples, batch_size=4, say=said.append)
        found = lls(evaluated(lm, CHOICES, limit=3), CHOICES)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert not said
    first = evaluated(harness(loaded, tmp_path / "0"), ANSWERS, limit=2)
    assert answers(evaluated(lm, ANSWERS, limit=2), ANSWERS) == answers(first, ANSWERS)
    assert ["first member alone" in words for words in said] == [True]


def test_a_linearised_posterior_is_drawn_from_and_that_is_said(loaded, averaged, evaluated):
    linearised = Loaded(loaded.model, Linearised(loaded.posterior), loaded.tokenizer, loaded.settings)
    said: list[str] = []
    found = evaluated(ours.VarloraLM(linearised, samples=S, batch_size=4, say=said.append), LETTERS)
    assert torch.equal(lls(found, LETTERS), lls(averaged, LETTERS))
    assert ["without the linearisation" in words for words in said] == [True]
    ours.VarloraLM(linearised, samples=0, say=said.append)
    assert len(said) == 1


def test_what_was_chosen_on_held_out_rows_is_used(trained, evaluated):
    settings = {"lr": 0.1, "ess": 1e3, "hess_init": 0.1}
    run = trained("ivon", "calibrated", method_settings=settings, calibration_fraction=0.7)
    before = ours.VarloraLM(run, say=silent)
    assert (before.samples, before.facts["tau"]) == (10, 1.0)
    chosen = calibrate(run, samples=4, say=silent).chosen
    path = run / "adapter" / "calibration.json"
    by_others = {"tau": 0.25, "samples": 2, "pruned": 0.5, "noise": "independent"}
    path.write_text(json.dumps(json.loads(path.read_text()) | by_others))
    said: list[str] = []
    lm = ours.VarloraLM(run, batch_size=4, say=said.append)
    assert chosen.temperature != 1.0
    assert [lm.samples, lm.facts["tau"], lm.facts["pruned"]] == [2, 0.25, 0.5]
    assert ["temperature" in words for words in said] == [True]
    again = load(run)
    by_hand = Loaded(again.model, again.posterior.prune(0.5).scale(0.25), again.tokenizer, again.settings)
    same_draws = evaluated(ours.VarloraLM(by_hand, samples=2, batch_size=4), CHOICES, ANSWERS, limit=2)
    found = evaluated(lm, CHOICES, ANSWERS, limit=2)
    assert torch.equal(lls(found, CHOICES), lls(same_draws, CHOICES))
    assert answers(found, ANSWERS) == answers(same_draws, ANSWERS)
    trained_one = ours.VarloraLM(run, tau=1.0, samples=2, batch_size=4, say=said.append)
    assert trained_one.facts["pruned"] == 0.0
    assert len(said) == 1
    assert not torch.allclose(lls(evaluated(trained_one, CHOICES, limit=2), CHOICES), lls(found, CHOICES))


def test_the_cache_of_the_harness_holds_averages_alone(loaded, averaged, evaluated, tmp_path):
    for _ in range(2):
        lm = ours.VarloraLM(loaded, samples=S, batch_size=4, say=silent)
        found = evaluated(lm, CHOICES, TEXTS, use_cache=str(tmp_path / "cache"))
        for name in (CHOICES, TEXTS):
            assert torch.equal(lls(found, name), lls(averaged, name))


def test_choices_are_not_normalised_beside_a_cache(loaded, evaluated, tmp_path):
    """Of a row of which one choice is cached the harness asks the others alone."""
    lm = ours.VarloraLM(loaded, samples=S, batch_size=4, normalise_choices=True, say=silent)
    with pytest.raises(VarloraError, match="Leave out `use_cache`"):
        evaluated(lm, CHOICES, use_cache=str(tmp_path / "cache"))
    of_mean = ours.VarloraLM(loaded, samples=0, batch_size=4, normalise_choices=True, say=silent)
    found = evaluated(of_mean, CHOICES, use_cache=str(tmp_path / "of_mean"), limit=1)
    assert torch.equal(lls(found, CHOICES), lls(evaluated(of_mean, CHOICES, limit=1), CHOICES))


def test_results_say_where_they_come_from(averaged, loaded):
    facts = averaged["config"]["varlora"]
    assert (facts["samples"], facts["models"], facts["seed"], facts["tau"]) == (S, S, 0, 1.0)
    assert (facts["method"], facts["posterior"]) == ("ivon", "diagonal_gaussian")
    assert facts["run"] == loaded.settings.run_dir
    assert Path(facts["base"]).name == "base"


def test_the_harness_knows_it_by_name(ivon_run, evaluated, averaged):
    assert get_model("varlora") is ours.VarloraLM
    of_string = evaluated("varlora", CHOICES, model_args=f"run={ivon_run},samples={S}", batch_size=4, device="cpu")
    assert torch.equal(lls(of_string, CHOICES), lls(averaged, CHOICES))


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_command_line(ivon_run, tasks, averaged, tmp_path, monkeypatch, capsys):
    """As `python -m` runs it, without another process, and without the harness's own 13,000 tasks to read."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # which the harness sets for good
    command = ["run", "--model", "varlora", "--batch_size", "4", "--model_args", f"run={ivon_run},samples={S}"]
    where = ["--include_path", tasks, "--tasks", CHOICES, "--output_path", tmp_path / "out.json", "--log_samples"]
    monkeypatch.setattr(sys, "argv", ["varlora.integrations.lm_eval", *map(str, [*command, *where])])
    runpy.run_module("varlora.integrations.lm_eval", run_name="__main__")
    assert f"varlora ({{'run': '{ivon_run}', 'samples': {S}" in capsys.readouterr().out
    (file,) = tmp_path.glob("out*.json")
    written = json.loads(file.read_text())["results"][CHOICES]
    assert {name: written[name] for name in scores(averaged, CHOICES)} == scores(averaged, CHOICES)
    (samples,) = tmp_path.glob("samples_*.jsonl")
    assert calibration_of(samples) == calibration_of(averaged["samples"][CHOICES])


def test_the_command_line_says_what_is_wrong(monkeypatch, ivon_run):
    monkeypatch.setattr(sys, "argv", [])
    model_args = f"run={ivon_run},sample=3"
    monkeypatch.setattr(
        "lm_eval.__main__.cli_evaluate", lambda: get_model("varlora").create_from_arg_string(model_args)
    )
    with pytest.raises(SystemExit, match=r"^error: .*Did you mean `samples`"):
        ours.main(["run"])


@pytest.mark.parametrize("model_args", ["samples=10", "path=runs/my-run"])
def test_a_run_that_is_not_given_is_asked_for(monkeypatch, model_args):
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(
        "lm_eval.__main__.cli_evaluate", lambda: get_model("varlora").create_from_arg_string(model_args)
    )
    with pytest.raises(SystemExit, match=r"^error: Expected `run`.*--model_args run=runs/my-run"):
        ours.main(["run"])


def test_normalised_choices_are_what_the_average_of_each_draws_probabilities_is(draws, loaded, evaluated):
    lm = ours.VarloraLM(loaded, samples=S, normalise_choices=True, batch_size=4, say=silent)
    found = evaluated(lm, CHOICES, ENDINGS, LETTERS)
    for task in (CHOICES, LETTERS):
        each = [choices_of(results["samples"][task])[0] for results in draws]
        torch.testing.assert_close(
            choices_of(found["samples"][task])[0], torch.stack(each).mean(0), rtol=1e-4, atol=1e-5
        )
        for row in answers(found, task):
            assert sum(math.exp(request[0][0]) for request in row) == pytest.approx(1.0)
    each = torch.stack([lls(results, ENDINGS) for results in draws])  # what is no choice stays
    torch.testing.assert_close(lls(found, ENDINGS), each.logsumexp(0) - math.log(S), rtol=1e-5, atol=1e-4)
    assert found["config"]["varlora"]["normalise_choices"]


def test_normalised_choices_are_those_that_varlora_evaluates(ivon_run):
    """On the run's own task: the same draws of the same seed, so the same probabilities, to rounding."""
    settings = settings_of(ivon_run)
    varlora.evaluate(ivon_run, samples=S, say=silent)
    expected = load_predictions(ivon_run / "predictions.safetensors")
    rows = load_rows(get_task("boolq"), "dev", settings.data_dir).examples
    requests = [
        Instance("loglikelihood", {}, (row.prompt, f" {answer}"), index, ("boolq", number, 1))
        for number, row in enumerate(rows)
        for index, answer in enumerate(row.answers)
    ]
    lm = ours.VarloraLM(ivon_run, samples=S, normalise_choices=True, batch_size=2, say=silent)
    twice = [request for request in requests for _ in range(2)]  # as for `repeats: 2`
    found = lm.loglikelihood(twice, disable_tqdm=True)[::2]
    probs = torch.tensor([ll for ll, _ in found], dtype=torch.float64).exp().view(len(rows), 2)
    torch.testing.assert_close(probs, expected.probs, rtol=1e-4, atol=1e-5)
    plain = ours.VarloraLM(ivon_run, samples=S, batch_size=2, say=silent).loglikelihood(requests, disable_tqdm=True)
    whole = torch.tensor([ll for ll, _ in plain], dtype=torch.float64).view(len(rows), 2).softmax(1)
    assert not torch.allclose(whole, expected.probs, atol=1e-3)


def test_calibration_is_of_the_probabilities_that_the_harness_has_the_brier_score_of(averaged):
    """Its own metric is the oracle where it has one; each row's is made here where it has none."""
    values = calibration_of(averaged["samples"][LETTERS])
    assert values["accuracy"] == scores(averaged, LETTERS)["acc,none"]
    assert values["brier"] == pytest.approx(scores(averaged, LETTERS)["brier_score,none"], abs=1e-9)
    found = calibration_of(averaged["samples"][CHOICES])
    rows = [json.loads(line) for line in (ASSETS / "lm_eval" / "choices.jsonl").read_text().splitlines()]
    losses = []
    for row, of_row in zip(rows, answers(averaged, CHOICES)):
        likelihoods = torch.tensor([request[0][0] for request in of_row], dtype=torch.float64)
        losses.append((likelihoods.logsumexp(0) - likelihoods[row["answer"]]).item())
    assert found["nll"] == pytest.approx(sum(losses) / len(losses))
    assert found["accuracy"] == scores(averaged, CHOICES)["acc,none"]
    assert found["rows"] == 12


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"samples": -1}, "`samples` to be a whole number >= 0, but got -1"),
        ({"samples": 2.5}, "`samples` to be a whole number"),
        ({"samples": "many"}, "'many'"),
        ({"samples": True}, "True"),
        ({"seed": -3}, "`seed`"),
        ({"tau": -1.0}, "`tau` to be a factor"),
        ({"tau": "big"}, "`tau` to be a factor"),
        ({"normalise_choices": "yes"}, "`normalise_choices` to be True or False"),
        ({"sample": 3}, "Did you mean `samples`"),
        ({"trust_remote_code": True}, "never run"),
        ({"pretrained": "gpt2"}, "are the run's"),
    ],
)
def test_a_wrong_setting_is_said(loaded, settings, what):
    with pytest.raises(VarloraError, match=what):
        ours.VarloraLM(loaded, say=silent, **settings)


def test_a_wrong_run_is_said(tmp_path):
    with pytest.raises(VarloraError, match="nowhere"):
        ours.VarloraLM(tmp_path / "nowhere")


def test_several_processes_are_refused(loaded, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(VarloraError, match="one process, but WORLD_SIZE is 2"):
        ours.VarloraLM(loaded)


def test_an_empty_continuation_is_said(loaded):
    lm = ours.VarloraLM(loaded, samples=2, say=silent)
    with pytest.raises(VarloraError, match="continuation of 1 to"):
        lm._loglikelihood_tokens([(("a", ""), [1], [])])
    assert lm._loglikelihood_tokens([]) == []
    assert lm.loglikelihood_rolling([]) == []


def by_shares(loaded: Loaded) -> tuple[Loaded, list[Point]]:
    """A mixture that holds one member four times and another one once: they have shares of 4/5 and 1/5."""
    members = [Point(loaded.posterior.mean), Point(loaded.posterior.draw(torch.Generator().manual_seed(5)))]
    mixed = Mixture([members[0]] * 4 + [members[1]])
    return Loaded(loaded.model, mixed, loaded.tokenizer, loaded.settings), members


def probs_after(loaded: Loaded, member: Point, context: list[int]) -> torch.Tensor:
    with member.at_mean(loaded.model), torch.no_grad():
        return loaded.model(torch.tensor([context])).logits[0, -1].double().softmax(-1)


def test_a_member_counts_by_its_share(loaded):
    """For the loglikelihood, and for the greedy token also where equal shares would say another one."""
    mixed, members = by_shares(loaded)
    lm = ours.VarloraLM(mixed, samples=0, say=silent)
    rows = [json.loads(line) for line in (ASSETS / "lm_eval" / "texts.jsonl").read_text().splitlines()]
    text = [token for row in rows for token in lm.tok_encode(row["start"])]
    pairs, expected = [], []
    for at in range(len(text) - 4):
        one, other = (probs_after(loaded, member, text[at : at + 4]) for member in members)
        by_share = 0.8 * one + 0.2 * other
        equal = 0.5 * one + 0.5 * other
        if by_share.argmax() != equal.argmax():
            for token in (by_share.argmax().item(), equal.argmax().item()):
                pairs.append((None, text[at : at + 4], [token]))
                expected.append((math.log(by_share[token].item()), token == by_share.argmax().item()))
    assert pairs
    found = lm._loglikelihood_tokens(pairs, disable_tqdm=True)
    assert [ll for ll, _ in found] == pytest.approx([ll for ll, _ in expected], abs=1e-5)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]


def test_choices_without_their_question_are_made_probabilities_among_themselves(loaded):
    lm = ours.VarloraLM(loaded, samples=2, normalise_choices=True, say=silent)
    texts = [(question, letter) for question in ("Is it?", "") for letter in (" A", " B")]
    requests = [Instance("loglikelihood", {}, pair, index, ("task", 0, 1)) for index, pair in enumerate(texts)]
    probs = [math.exp(ll) for ll, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    assert probs[0] + probs[1] == pytest.approx(1.0)
    assert probs[2] + probs[3] == pytest.approx(1.0)


def test_loglikelihoods_of_a_base_in_bfloat16_are_not_rounded_to_it(trained):
    run = load(trained("adamw", "half", dtype="bfloat16"))
    (found,) = ours.VarloraLM(run, samples=0, say=silent)._loglikelihood_tokens([(None, [5, 6, 7], [8, 9])])
    with torch.no_grad():
        logits = run.model(torch.tensor([[5, 6, 7, 8]])).logits[0]
    assert logits.dtype == torch.bfloat16
    expected = logits.double().log_softmax(-1)
    assert found[0] == pytest.approx((expected[2, 8] + expected[3, 9]).item(), abs=1e-4)
