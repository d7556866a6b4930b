"""LoRA with Lightning and IVON: python examples/lightning_module.py (half a minute on a CPU, no network)."""

import argparse
from contextlib import nullcontext

import lightning
import torch
from torch.nn.functional import cross_entropy, nll_loss
from torch.utils.data import DataLoader

import varlora.demo
from varlora import IVON
from varlora.data import collate, encode_all

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=500)
steps = parser.parse_args().steps

demo = varlora.demo.load()  # a Llama of 0.9 million parameters with a LoRA adapter, its tokenizer and tasks
task, tokenizer = demo.tasks["two_choices"], demo.tokenizer
train, held_out = (encode_all(tokenizer, varlora.load_rows(task, split).examples).rows for split in ("train", "dev"))


class Classifier(lightning.LightningModule):
    """A language model that chooses among a question's answers."""

    def __init__(self):
        super().__init__()
        self.model = demo.model.train()

    def training_step(self, batch, index):
        """Return the average loss."""
        return cross_entropy(varlora.class_logits(self.model, batch), batch["labels"])

    def configure_optimizers(self):
        """Return the optimizer, and a learning rate that decays to 0."""
        optimizer = IVON(self.named_parameters(), lr=0.5, ess=1e6, hess_init=2e-4, seed=0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def evaluate(model, optimizer, draws):
    """Print accuracy and NLL of the answers' probabilities, averaged over draws; with none, at the mean."""
    batch, probs = collate(held_out, tokenizer.pad_token_id), []
    draw = getattr(optimizer, "sampled_params", nullcontext)  # AdamW has nothing to draw from
    for _ in range(max(draws, 1)):
        with torch.no_grad(), draw() if draws else nullcontext():
            probs.append(varlora.class_logits(model, batch).softmax(-1))
    average = torch.stack(probs).mean(0)
    accuracy = (average.argmax(-1) == batch["labels"]).float().mean()
    print(f"{draws:2} draws: accuracy {accuracy:.1%}, NLL {nll_loss(average.log(), batch['labels']).item():.3f}")


lightning.seed_everything(0)
loader = DataLoader(train, batch_size=8, shuffle=True, collate_fn=lambda rows: collate(rows, tokenizer.pad_token_id))
trainer = lightning.Trainer(max_steps=steps, gradient_clip_val=1.0, logger=False, enable_checkpointing=False)
trainer.fit(Classifier(), loader)
for draws in (0, 10):
    evaluate(demo.model.eval(), trainer.optimizers[0], draws)
