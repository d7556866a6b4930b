"""LoRA in a loop of one's own with accelerate and IVON: python examples/accelerate_loop.py (on a CPU, no network)."""

import argparse
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy, nll_loss
from torch.utils.data import DataLoader

import varlora.demo
from varlora.data import collate, encode_all

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=500)
steps = parser.parse_args().steps

demo = varlora.demo.load()  # a Llama of 0.9 million parameters with a LoRA adapter, its tokenizer and tasks
model, tokenizer, task = demo.model, demo.tokenizer, demo.tasks["two_choices"]
train, held_out = (encode_all(tokenizer, varlora.load_rows(task, split).examples).rows for split in ("train", "dev"))


def batch_of(rows):
    """Return a batch, padded on the left."""
    return collate(rows, tokenizer.pad_token_id)


def evaluate(model, optimizer, draws):
    """Print accuracy and NLL of the answers' probabilities, averaged over draws; with none, at the mean."""
    batch, probs = batch_of(held_out), []
    draw = getattr(optimizer, "sampled_params", nullcontext)  # AdamW has nothing to draw from
    for _ in range(max(draws, 1)):
        with torch.no_grad(), draw() if draws else nullcontext():
            probs.append(varlora.class_logits(model, batch).softmax(-1))
    average = torch.stack(probs).mean(0)
    accuracy = (average.argmax(-1) == batch["labels"]).float().mean().item()
    print(f"{draws:2} draws: accuracy {accuracy:.1%}, NLL {nll_loss(average.log(), batch['labels']).item():.3f}")


torch.manual_seed(0)
accelerator = Accelerator(cpu=True)
optimizer = varlora.IVON(model.named_parameters(), lr=0.5, ess=1e6, hess_init=2e-4, seed=0)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
loader = DataLoader(train, batch_size=8, shuffle=True, collate_fn=batch_of)
model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
model.train()
for _, batch in zip(range(steps), (batch for _ in range(steps) for batch in loader)):
    optimizer.train()
    accelerator.backward(cross_entropy(varlora.class_logits(model, batch), batch["labels"]))
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
model.eval()
for draws in (0, 10):
    evaluate(model, optimizer.optimizer, draws)
