"""Pretrain the demo's base model from nothing, and write it with its tokenizer, tasks and scores to the package.

The base is a Llama of 0.9 million parameters that learns a made-up world (`world.py`) from text that is generated on
the way: row i is a function of the seed and i. `transformers.Trainer` trains it; the loss on a token that answers a
question counts eight times. On one thread the same seed gives the same bits. On another machine rounding differs, and
the scores agree within `TOLERANCE`, which `--check` verifies.

    python pretraining/pretrain.py                             # writes the package's base; start it again to go on
    python pretraining/pretrain.py --out build/demo --check    # beside it, and compare with the scores of the package's
    python pretraining/pretrain.py --out build/demo --steps 50 # a try
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainerCallback, set_seed
from transformers import TrainingArguments as Arguments
from world import (
    JUDGE,
    JUDGEMENTS,
    LABELS,
    LETTERS,
    PROPERTIES,
    SELECT,
    TASKS,
    Document,
    World,
    ask_for_label,
    ask_whether,
    ask_which,
    make_world,
    random_document,
    task_rows,
    tell,
)

from varlora.checkpoint import CheckpointTrainer, latest_checkpoint
from varlora.files import read_json, write_json, write_text
from varlora.run import origin
from varlora.tasks import get_task, load_rows

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "varlora" / "demo" / "bundled"

VOCABULARY = 640
WIDTH, LAYERS, HEADS = 128, 4, 4
LENGTH, ROWS = 64, 64  # tokens a row, rows a step
CHOOSING = 0.26  # share of the steps in which choosing is learned, before facts are
ANSWER_WEIGHT = 8.0  # of the token that answers a question, in the loss
SAVE_EVERY = 250  # steps between checkpoints
PROBES = 600  # questions behind each score
TOLERANCE, TOLERANCE_NEVER_TOLD = 0.08, 0.16
"""By how much a score may differ between two machines. There are only 180 facts to ask about that were never told, and
two bases guess them differently."""


def main(argv: Sequence[str] | None = None) -> int:
    """Pretrain, score and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PACKAGE, help="folder to write (default: the package's)")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "pretraining", help="folder for checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="seed of world, text and weights (default: 0)")
    parser.add_argument("--steps", type=int, default=4500, help="optimizer steps (default: 4500)")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="highest learning rate (default: 1.5e-3)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--check", action="store_true", help="compare the scores with those of the package's base")
    args = parser.parse_args(argv)
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "work", "check")}
    expected = read_json(PACKAGE / "base" / "pretraining.json")["scores"] if args.check else {}
    begin(args.work, settings)
    torch.set_num_threads(args.threads)
    made = args.work / "made"  # put in place at the end, so that base and tasks are always of one world
    world = make_world(args.seed)
    write_tasks(made / "tasks", world)
    tokenizer = make_tokenizer(world)
    model, seconds = pretrain(world, tokenizer, args, made / "tasks")
    found = scores(model, tokenizer, world, made / "tasks")
    model.save_pretrained(made / "base")
    tokenizer.save_pretrained(made / "base")
    card = {"settings": settings, "parameters": model.num_parameters(), "seconds": round(seconds), "scores": found}
    write_json(made / "base" / "pretraining.json", card | {"origin": origin()})
    shutil.copytree(made, args.out, dirs_exist_ok=True)
    shutil.rmtree(args.work)
    print(json.dumps(found, indent=2))
    return compare(found, expected)


def begin(work: Path, settings: Mapping[str, Any]) -> None:
    """Remember what the checkpoints in a folder are made with, and refuse to go on with anything else."""
    sources = b"".join((Path(__file__).parent / name).read_bytes() for name in ("pretrain.py", "world.py"))
    now = {**settings, "sources": hashlib.sha256(sources).hexdigest()}
    marker = work / "settings.json"
    if work.exists() and any(work.iterdir()):
        before = read_json(marker) if marker.is_file() else None
        if before != now:
            what = "no checkpoints of this script" if before is None else f"checkpoints of {before}, not of {now}"
            raise SystemExit(f"{work} holds {what}. Delete it, or pass another --work.")
    work.mkdir(parents=True, exist_ok=True)
    write_json(marker, now)


def compare(found: Mapping[str, float], expected: Mapping[str, float]) -> int:
    """Say which scores are missing or differ by more than the tolerance, and return how many."""
    wrong = 0
    for name, value in expected.items():
        tolerance = TOLERANCE_NEVER_TOLD if name.endswith("never_told") else TOLERANCE
        if not abs(found.get(name, math.nan) - value) <= tolerance:
            wrong += 1
            got = found.get(name, "nothing")
            print(f"{name}: expected {value:.3f} within {tolerance}, but got {got}", file=sys.stderr)
    if expected:
        print(f"{len(expected) - wrong} of {len(expected)} scores agree.")
    return wrong


# --- text, tokenizer, tasks


def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the world's text and the tasks' prompts; a name has two tokens, most words one."""
    source = random.Random(0)
    documents = (random_document(world, source) for _ in range(5000))
    texts = [f"{document.text} {document.answer}" for document in documents] + [SELECT, JUDGE] * 300
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def write_tasks(folder: Path, world: World) -> None:
    """Write each task's description and rows."""
    for name, task in TASKS.items():
        files = {split: f"{name}.{split}.jsonl" for split in ("train", "dev")}
        for split, file in files.items():
            rows = task_rows(world, name, split)
            write_text(folder / file, "".join(json.dumps(row) + "\n" for row in rows))
        description = {"name": name, **task.description, "label": "answer", "id": "id", "slice": "fact", "files": files}
        head = f"# What is so in a made-up world, asked in the format of {task.like}.\n"
        write_text(folder / f"{name}.yaml", head + yaml.safe_dump(description, sort_keys=False, width=1000))


# --- training


@dataclass(frozen=True)
class Text(Dataset):
    """Rows of documents one after another; row i is a function of the seed and i."""

    world: World
    tokenizer: PreTrainedTokenizerFast
    seed: int
    rows: int

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        source = random.Random(f"{self.seed} {index}")
        stage = int(index >= CHOOSING * self.rows)
        ids: list[int] = []
        weight: list[float] = []
        while len(ids) <= LENGTH:
            document = random_document(self.world, source, stage)
            text = self.tokenizer(document.text)["input_ids"]
            answer = self.tokenizer(f" {document.answer}", add_special_tokens=False)["input_ids"]
            ids += text + answer
            weight += [1.0] * len(text) + [ANSWER_WEIGHT] * len(answer)
        return {"ids": torch.tensor(ids[: LENGTH + 1]), "weight": torch.tensor(weight[: LENGTH + 1])}


class Pretrainer(CheckpointTrainer):
    """The Trainer with a loss in which answers count for more, and rows in their order."""

    _load_from_checkpoint = Trainer._load_from_checkpoint  # a whole model, not an adapter

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean over the tokens of the cross-entropy, an answer's counted `ANSWER_WEIGHT` times."""
        ids, weight = inputs["ids"], inputs["weight"][:, 1:]
        logits = model(input_ids=ids[:, :-1]).logits  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return (loss * weight.flatten()).sum() / weight.sum()

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)


class Progress(TrainerCallback):
    """Prints scores now and then, so that a run that learns nothing is seen early, and keeps the time."""

    def __init__(self, score: Callable[[Any], Mapping[str, float]]) -> None:
        self.score, self.seconds, self.started = score, 0.0, time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on from the time that a resumed run had taken."""
        self.seconds = state.stateful_callbacks.get("progress", {}).get("seconds", 0.0)
        self.started = time.monotonic() - self.seconds

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Score the model as it is."""
        self.seconds = time.monotonic() - self.started
        state.stateful_callbacks["progress"] = {"seconds": self.seconds}
        if state.global_step % SAVE_EVERY == 0:
            model.eval()
            line = ", ".join(f"{name} {value:.2f}" for name, value in self.score(model).items())
            model.train()
            print(f"step {state.global_step}, {self.seconds:.0f} s: {line}", flush=True)


def pretrain(
    world: World, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace, tasks: Path
) -> tuple[Any, float]:
    """Return the trained model and the seconds that it took."""
    set_seed(args.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 8 // 3 // 16 * 16,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        initializer_range=0.06,  # at the usual 0.02 choosing had not appeared after 1100 steps
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    arguments = Arguments(
        output_dir=str(args.work),
        max_steps=args.steps,
        per_device_train_batch_size=ROWS,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=min(200, args.steps // 10),
        adam_beta2=0.98,
        weight_decay=0.05,
        seed=args.seed,
        save_steps=SAVE_EVERY,
        save_total_limit=1,
        logging_steps=100,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    progress = Progress(lambda model: scores(model, tokenizer, world, tasks, probes=min(200, PROBES)))
    trainer = Pretrainer(
        model=LlamaForCausalLM(config),
        args=arguments,
        train_dataset=Text(world, tokenizer, args.seed, args.steps * ROWS),
        callbacks=[progress],
    )
    start = latest_checkpoint(args.work, print)
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    return trainer.model.eval(), progress.seconds


# --- scores

Question = tuple[str, Sequence[str], str]
"""Prompt, answers to choose from, the right one."""


def scores(model: Any, tokenizer: Any, world: World, folder: Path, probes: int | None = None) -> dict[str, float]:
    """Return the share of right answers to each kind of question.

    Args:
        model: the base.
        tokenizer: its tokenizer.
        world: what is so.
        folder: where the tasks lie.
        probes: questions of each kind, drawn with a fixed seed; None: `PROBES`.
    """
    probes = probes or PROBES
    source = random.Random(1)
    words = [value for values in PROPERTIES.values() for value in values]
    groups = {
        "practised": world.practised_and_told,
        "told": [fact for fact in world.asked if fact.told],
        "never_told": [fact for fact in world.asked if not fact.told],
    }
    questions: dict[str, list[Question]] = {
        "which": [_asked(ask_which(4, source, "Letter"), LETTERS) for _ in range(probes)]
    }
    for name, facts in groups.items():
        drawn = source.choices(facts, k=probes)
        questions[f"sentence_{name}"] = [_asked(tell(fact), words) for fact in drawn]
        for cue, labels in LABELS.items():
            asked = [ask_for_label(fact, 4, source, cue) for fact in drawn]
            questions[f"{cue.lower()}_{name}"] = [_asked(document, labels) for document in asked]
        for cue, answers in JUDGEMENTS.items():
            questions[f"{cue.lower()}_{name}"] = [_asked(ask_whether(fact, source, cue), answers) for fact in drawn]
    for name in TASKS:
        examples = load_rows(get_task(folder / f"{name}.yaml"), "dev").examples[:probes]
        questions[f"zero_shot_{name}"] = [(e.prompt, e.answers, e.answers[e.label or 0]) for e in examples]
    return {name: _share(model, tokenizer, asked) for name, asked in questions.items()}


def _asked(document: Document, answers: Sequence[str]) -> Question:
    return document.text, answers, document.answer


@torch.no_grad()
def _share(model: Any, tokenizer: Any, questions: Sequence[Question]) -> float:
    """Return the share of questions whose right answer is the likeliest."""
    right = 0
    token = functools.cache(lambda text: tokenizer.encode(f" {text}", add_special_tokens=False)[0])
    for start in range(0, len(questions), 100):
        part = questions[start : start + 100]
        batch = tokenizer([prompt for prompt, _, _ in part], padding=True, padding_side="left", return_tensors="pt")
        logits = model(**batch, logits_to_keep=1).logits[:, -1]  # (B, V)
        for row, (_, answers, answer) in zip(logits, part):
            right += answers[int(row[[token(text) for text in answers]].argmax())] == answer
    return right / len(questions)


if __name__ == "__main__":
    sys.exit(main())
