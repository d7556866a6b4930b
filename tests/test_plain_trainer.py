"""IVON in a user's own `transformers.Trainer`: the instance is passed, and nothing else changes."""

from __future__ import annotations

import copy

import helpers
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from varlora import IVON, load_posterior, save_adapter
from varlora.demo.run import one_thread
from varlora.errors import VarloraError

DATA = [{"input_ids": list(row.input_ids[:3]), "labels": list(row.input_ids[:3])} for row in helpers.make_rows(12)]


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def test_the_posterior_is_kept_beside_the_adapter_and_loaded_in_plain_peft(tmp_path):
    """As the README says."""
    model = make_model(lora=True)
    trainer = make_trainer(model, tmp_path / "trainer")
    trainer.train()
    posterior = trainer.optimizer.optimizer.posterior()
    save_adapter(model, posterior, tmp_path / "out")
    loaded = PeftModel.from_pretrained(make_model(lora=False), tmp_path / "out", is_trainable=True)
    found = load_posterior(loaded, tmp_path / "out")
    assert helpers.same(found.tensors(), posterior.tensors())
    with found.sampled(loaded, torch.Generator().manual_seed(0)), torch.no_grad():
        drawn = loaded(torch.tensor([[5, 6, 7]])).logits
    with posterior.sampled(model, torch.Generator().manual_seed(0)), torch.no_grad():
        torch.testing.assert_close(drawn, model.eval()(torch.tensor([[5, 6, 7]])).logits)
    frozen = PeftModel.from_pretrained(make_model(lora=False), tmp_path / "out")
    with pytest.raises(VarloraError, match="is_trainable=True"):
        load_posterior(frozen, tmp_path / "out")


class Watch(TrainerCallback):
    def __init__(self):
        self.training, self.evaluation, self.ended = [], [], {}

    def forward(self, model, *_):
        (self.training if model.training else self.evaluation).append(helpers.bits(model))

    def on_step_end(self, args, state, control, model, **kwargs):
        self.ended[state.global_step] = helpers.bits(model)
        if state.global_step == getattr(self, "crash_after", None):
            control.should_training_stop = True


def make_model(lora):
    model = AutoModelForCausalLM.from_pretrained(helpers.base_folder())
    if lora:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]))
    return model


def make_trainer(model, folder, optimizer=None, watch=None, **arguments):
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        **{"max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 2, "logging_steps": 1, **arguments},
    )  # fmt: skip
    optimizer = optimizer or IVON(
        [(name, p) for name, p in model.named_parameters() if p.requires_grad],
        lr=1.0, ess=1e6, hess_init=1e-3, clip_radius=1e-2, seed=0,
    )  # fmt: skip
    return Trainer(
        model, args, train_dataset=DATA, eval_dataset=DATA[:4], optimizers=(optimizer, None),
        callbacks=[watch] if watch else None,
    )  # fmt: skip


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
def test_trainer_draws_for_training_and_keeps_the_mean_for_all_else(lora, tmp_path):
    model, watch = make_model(lora), Watch()
    model.register_forward_pre_hook(watch.forward)
    trainer = make_trainer(
        model, tmp_path, watch=watch, gradient_accumulation_steps=2, per_device_train_batch_size=2,
        eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    trainer.train()
    assert len(watch.training) == 12
    for step in range(1, 7):
        mean, one, two = watch.ended[step], *watch.training[2 * step - 2 : 2 * step]
        assert helpers.same(one, two)
        assert not any(torch.equal(one[name], mean[name]) for name in mean)
    assert len(watch.evaluation) == 2
    assert helpers.same(watch.evaluation[0], watch.ended[3])
    assert helpers.same(watch.evaluation[1], watch.ended[6])
    posterior = trainer.optimizer.optimizer.posterior()
    assert helpers.same(dict(posterior.mean), watch.ended[6])
    assert helpers.same(helpers.bits(model), watch.ended[6])
    saved = load_file(tmp_path / "checkpoint-4" / ("adapter_model.safetensors" if lora else "model.safetensors"))
    for name, value in watch.ended[4].items():
        assert torch.equal(saved[name.replace(".default", "")], value)


def test_training_learns(tmp_path):
    trainer = make_trainer(make_model(False), tmp_path, max_steps=40, save_strategy="no")
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
def test_resume_from_the_trainers_own_checkpoint(lora, bf16, tmp_path):
    """It holds our state in `optimizer.pt`, which torch loads with `weights_only`."""
    whole = make_trainer(make_model(lora), tmp_path / "whole", bf16=bf16)
    whole.train()
    watch = Watch()
    watch.crash_after = 4
    make_trainer(make_model(lora), tmp_path / "cut", watch=watch, bf16=bf16).train()
    assert (tmp_path / "cut" / "checkpoint-4" / "optimizer.pt").is_file()
    resumed = make_trainer(make_model(lora), tmp_path / "cut", bf16=bf16)
    resumed.train(resume_from_checkpoint=True)
    assert helpers.same(helpers.bits(resumed.model), helpers.bits(whole.model))
    posteriors = [trainer.optimizer.optimizer.posterior().tensors() for trainer in (resumed, whole)]
    assert helpers.same(*posteriors)


def test_resume_in_bfloat16_keeps_the_float32_mean(tmp_path):
    def model():
        return make_model(False).to(torch.bfloat16)

    whole = make_trainer(model(), tmp_path / "whole")
    whole.train()
    watch = Watch()
    watch.crash_after = 2
    make_trainer(model(), tmp_path / "cut", watch=watch).train()
    resumed = make_trainer(model(), tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    mean, expected = (trainer.optimizer.optimizer.posterior().mean for trainer in (resumed, whole))
    assert all(value.dtype == torch.float32 for value in mean.values())
    assert helpers.same(mean, expected)


def test_state_dict_is_plain(tmp_path):
    """So that `torch.load(..., weights_only=True)` reads it."""
    trainer = make_trainer(make_model(True), tmp_path, max_steps=1)
    trainer.train()
    state = copy.deepcopy(trainer.optimizer.state_dict())
    torch.save(state, tmp_path / "state")
    torch.load(tmp_path / "state", weights_only=True)
