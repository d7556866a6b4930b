"""LoRA with `transformers.Trainer` and IVON: python examples/trainer.py (half a minute on a CPU, no network)."""

import argparse
import tempfile
from contextlib import nullcontext

import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import varlora.demo
from varlora import IVON
from varlora.data import collate, encode_all

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=500)
steps = parser.parse_args().steps

demo = varlora.demo.load()  # a Llama of 0.9 million parameters with a LoRA adapter, its tokenizer and tasks
model, tokenizer, task = demo.model, demo.tokenizer, demo.tasks["two_choices"]
train, held_out = (encode_all(tokenizer, varlora.load_rows(task, split).examples).rows for split in ("train", "dev"))


def with_answer(row):
    """Return the prompt's tokens and the answer's, which alone counts for the loss."""
    answer = row.label_tokens[row.label]
    return {"input_ids": [*row.input_ids, answer], "labels": [-100] * len(row.input_ids) + [answer]}


def evaluate(model, optimizer, draws):
    """Print accuracy and NLL of the answers' probabilities, averaged over draws; with none, at the mean."""
    batch, probs = collate(held_out, tokenizer.pad_token_id), []
    draw = getattr(optimizer, "sampled_params", nullcontext)  # AdamW has nothing to draw from
    for _ in range(max(draws, 1)):
        with torch.no_grad(), draw() if draws else nullcontext():
            probs.append(varlora.class_logits(model, batch).softmax(-1))
    average = torch.stack(probs).mean(0)
    accuracy = (average.argmax(-1) == batch["labels"]).float().mean().item()
    nll = torch.nn.functional.nll_loss(average.log(), batch["labels"]).item()
    print(f"{draws:2} draws: accuracy {accuracy:.1%}, NLL {nll:.3f}")


with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=8, use_cpu=True, save_strategy="no", report_to="none"
    )
    optimizer = IVON(model.named_parameters(), lr=0.5, ess=1e6, hess_init=2e-4, seed=0)
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=[with_answer(row) for row in train],
        optimizers=(optimizer, None),
    )
    trainer.train()
model.eval()
for draws in (0, 10):
    evaluate(model, optimizer, draws)
