"""Export: draws of a posterior as ordinary PEFT adapters, with all that servers of several adapters need.

A draw is a set of weights, so it is an adapter like any other: a server with room for several (vLLM, SGLang) holds the
base once and answers a question by each draw in one batch. What is particular to a posterior happens at the client,
which averages the draws' probabilities: `client.py`, which goes into the export with the `manifest.json` it reads.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from varlora import client
from varlora.config import Settings
from varlora.drawing import Draw
from varlora.draws import distinct, holds, means, same_weights
from varlora.errors import DamagedFileError, VarloraError
from varlora.files import MANIFEST, atomic_folder, checksums, read_json, write_json, write_text
from varlora.loading import Loaded, load, revision_of, rows_of_split, trained_task
from varlora.params import copied, swapped, trainable
from varlora.posterior import Linearised, Mixture, Posterior
from varlora.posterior.base import check_draws
from varlora.predictions import load_predictions
from varlora.prompt import PROMPT_VERSION, answer_tokens, prompt_ids
from varlora.run import origin
from varlora.templating import environment

__all__ = ["export"]

Say = Callable[[str], None]

KEY = "varlora_export"
"""In the manifest: the version of its form. Only a folder whose manifest has it is ever replaced."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for --max-lora-rank."""
SCRIPTS = ("serve_vllm.sh", "serve_sglang.sh")


def export(
    run_dir: str | Path,
    to: str | Path,
    *,
    samples: int | None = None,
    seed: int = 0,
    tau: float | None = None,
    calibration: bool = True,
    answers: Sequence[str] | None = None,
    model: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
    say: Say = print,
) -> dict[str, Any]:
    """Write the mean and draws of a run's posterior as PEFT adapters, with scripts to serve and a client to ask them.

    The draws are those of `varlora predict` and `varlora evaluate` with the same seed on the same kind of device.

    Args:
        run_dir: a trained run.
        to: folder to write; it appears whole or not at all.
        samples: draws; 0: only the mean; left out: what `varlora calibrate` chose, else 10.
        seed: seed of the draws.
        tau: factor of the variance of what was trained, without the rest of what was chosen; left out: what was chosen.
        calibration: use the posterior as `varlora calibrate` chose, if it did.
        answers: what the model may say, if neither the run's predictions nor its rows are here to tell.
        model: where the base lies now, if not where it was.
        device: where to load it to; left out: the current GPU, else the CPU.
        overwrite: replace an earlier export; a folder that is none is never replaced.
        say: told in words what a user should know.

    Returns:
        What `manifest.json` holds.

    Raises:
        VarloraError: `to` is taken, `samples` or `tau` is out of its range, or the answers are not known; see `load`.
    """
    run_dir, to = Path(run_dir), Path(to).resolve()  # `.` has no name, and what a link leads to is meant
    if samples is not None:
        check_draws(samples, what="samples")
    _check_free(to, overwrite)
    loaded = load(run_dir, model=model, device=device)
    if tau is None and not calibration:
        tau = 1.0
    chosen = loaded.calibration if tau is None else None
    posterior, samples, tau, how = loaded.used(samples, tau)
    base = model or loaded.settings.model
    if Path(base).exists():  # the scripts are run from anywhere
        base = str(Path(base).resolve())
    known, questions = _answers(run_dir, loaded, answers, say)
    on = next(iter(trainable(loaded.model).values())).device
    generator = torch.Generator(on).manual_seed(seed)
    draws = distinct(posterior.drawn(samples, generator, how).models() if samples else means(posterior))
    notes = _notes(posterior, samples, draws, loaded.settings, loaded.tokenizer)
    for note in notes:
        say(note)

    with posterior.at_mean(loaded.model):
        mean = copied(loaded.model)
    is_mean = len(draws) == 1 and same_weights(draws[0].weights, mean)
    width = max(2, len(str(len(draws) - 1)))
    names = ["mean"] if is_mean else [f"draw-{index:0{width}}" for index in range(len(draws))]
    folders = {"mean": mean} | {name: draw.weights for name, draw in zip(names, draws)}
    manifest = {
        KEY: 1,
        **_facts(run_dir, loaded.settings),
        "base": {"model": base, "revision": revision_of(loaded.settings, model)},
        "posterior": loaded.posterior.kind,
        "seed": seed,
        "samples": samples,
        "tau": tau,
        "calibration": asdict(chosen) if chosen else None,
        "device": on.type,
        "draws": [
            {"name": name, "temperature": draw.temperature, "weight": draw.weight} for name, draw in zip(names, draws)
        ],
        "answers": known,
        "notes": notes,
        **origin(),
    }

    def finish(folder: Path) -> None:
        manifest["files"] = checksums(folder)
        write_json(folder / MANIFEST, manifest)

    with atomic_folder(to, finish, then="export again") as temporary:
        for name, weights in folders.items():
            with swapped(loaded.model, weights):
                loaded.model.save_pretrained(temporary / name)  # type: ignore[operator]
            (temporary / name / "README.md").unlink(missing_ok=True)  # PEFT's, without content
        for script in SCRIPTS:
            write_text(temporary / script, _script(script, list(folders), manifest["base"], loaded.settings))
            (temporary / script).chmod(0o755)
        write_text(temporary / "client.py", Path(client.__file__).read_text(encoding="utf-8"))
        write_text(temporary / "example.jsonl", "".join(json.dumps(question) + "\n" for question in questions[:3]))
    return manifest


def _check_free(to: Path, overwrite: bool) -> None:
    if to.exists() and not to.is_dir():
        raise VarloraError(f"Expected `to` to be a folder, but {to} is a file. Choose another name.")
    if not (there := next(folder for folder in to.parents if folder.exists())).is_dir():
        raise VarloraError(f"Expected `to` to be a folder, but {there}, where it would lie, is a file.")
    if not to.is_dir() or not any(to.iterdir()):
        return
    if not overwrite:
        raise VarloraError(f"The folder {to} exists already. Pass `--overwrite` to replace it, or another `--to`.")
    try:
        manifest = read_json(to / MANIFEST)
    except DamagedFileError:
        manifest = None
    if not isinstance(manifest, Mapping) or KEY not in manifest:
        raise VarloraError(f"{to} is not an export (its {MANIFEST} does not say so): it stays. Choose another `--to`.")


def _facts(run_dir: Path, settings: Settings) -> dict[str, Any]:
    config = read_json(run_dir / "config.json")
    return {
        "task": trained_task(run_dir, settings).name,
        "task_version": config.get("task_version"),
        "prompt_version": config.get("prompt_version", PROMPT_VERSION),
        "method": settings.method,
        "base_checksum": config.get("base"),
        "chat": settings.chat,
        "max_length": settings.max_length,
        "trained": config.get("versions"),
    }


def _notes(posterior: Posterior, samples: int, draws: Sequence[Draw], settings: Settings, tokenizer: Any) -> list[str]:
    """Return in words where what is served is not what `varlora predict` computes."""
    notes = []
    if samples and holds(posterior, Linearised):
        notes.append(
            "This posterior's predictive is that of the linearised model, which no adapter can serve. The draws are of "
            "its Gaussian over the weights, without the linearisation: their probabilities differ from `varlora "
            "predict`'s, and are often worse. Test them before you rely on them, or export the mean (`--samples 0`)."
        )
    if samples > 1 and len(draws) == 1:
        notes.append("All draws of this posterior are one model, so there is nothing to average: the export has one.")
    if holds(posterior, Mixture):
        notes.append("An ensemble has no single mean: `mean/` is its first member's.")
        if not samples and any(draw.temperature != 1 for draw in draws):
            notes.append(
                "The temperature divides each member's logits here; `varlora predict` divides their average's."
            )
    if settings.quantization:
        notes.append(
            f"The adapter was trained on a base in {settings.quantization}: from a server that quantises it otherwise, "
            "or not at all, probabilities differ slightly."
        )
    if settings.chat and "strftime_now(" in tokenizer.get_chat_template():
        notes.append(
            "The chat template writes the date into each prompt: a server takes today's, where the adapter was trained "
            "with one that stays. Write a date into the template that the server uses (`--chat-template`)."
        )
    if not settings.chat and tokenizer("a")["input_ids"] != prompt_ids(tokenizer, ["a"])[0]:
        notes.append(
            "The tokenizer ends each text with its EOS token, after which the adapter was not trained to answer: a "
            "server that tokenises with it reads the answers from the wrong place. Send token ids in place of texts."
        )
    return notes


def _answers(
    run_dir: Path, loaded: Loaded, answers: Sequence[str] | None, say: Say
) -> tuple[list[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Return each list of answers that questions have, with their tokens, and the questions.

    Tokens depend on whether white space ends the prompt, so there are those of both endings; a chat template has one.
    """
    settings, tokenizer = loaded.settings, loaded.tokenizer
    rows = [("", tuple(answers))] if answers else _rows(run_dir, settings)
    if not rows:
        raise VarloraError(
            "Expected `answers`: no predictions or rows of the run's task are here to tell them. "
            "Pass `--answers` with what the model may say, or run `varlora evaluate` first."
        )
    texts = Counter(tokenizer.batch_decode([[token] for token in range(len(tokenizer))]))
    lists = list(dict.fromkeys(of_row for _, of_row in rows))
    known = []
    for of_row in lists:
        for after_space in (False,) if settings.chat else (False, True):
            tokens = answer_tokens(tokenizer, of_row, settings.chat, after_space)
            known.append(
                [
                    {"answer": answer, "id": token, "text": text, "shared": texts[text] > 1, "after_space": after_space}
                    for answer, token in zip(of_row, tokens)
                    for text in [str(tokenizer.decode([token]))]
                ]
            )
    if len(lists) > 1:
        say(f"Questions have {len(lists)} different lists of answers: a question has to come with its `answers`.")
    return known, [{"prompt": p, "answers": list(of_row)} for p, of_row in rows if p]


def _rows(run_dir: Path, settings: Settings) -> list[tuple[str, tuple[str, ...]]]:
    """Return prompt and answers of rows, from the run's predictions or else from the data; none if neither is here."""
    try:
        predictions = load_predictions(run_dir / "predictions.safetensors")
        if predictions.prompts and predictions.answers:
            return list(zip(predictions.prompts, predictions.answers))
    except DamagedFileError:
        pass
    task = trained_task(run_dir, settings)
    try:
        examples = rows_of_split(task, task.evaluation, settings, lambda text: None)
    except VarloraError:
        return []
    return [(example.prompt, tuple(example.answers)) for example in examples]


def _script(name: str, adapters: Sequence[str], base: Mapping[str, Any], settings: Settings) -> str:
    """Return the shell script that serves the adapters; every text in it is quoted for the shell."""
    rank = settings.lora.rank
    templates = environment(autoescape=False)
    templates.filters["quoted"] = lambda text: shlex.quote(str(text))
    return templates.get_template(f"{name}.jinja").render(
        adapters=adapters,
        model=base["model"],
        revision=base["revision"],
        dtype="auto" if settings.dtype == "float32" else settings.dtype,
        rank=rank,
        vllm_rank=next((most for most in RANKS if most >= rank), rank),
        four_bit=settings.quantization == "4bit",
    )
