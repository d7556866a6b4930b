"""What can go wrong on a GPU alone: tensors and generators on two devices, and checkpoints that come from the CPU."""

from __future__ import annotations

import helpers
import pytest
import torch
from conformance.test_methods import ROWS, Crash

from varlora.checkpoint import load_adapter, load_posterior
from varlora.data import collate
from varlora.drawing import Drawing
from varlora.model import class_logits
from varlora.params import copied
from varlora.posterior import DiagonalGaussian

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_method_trains_resumes_and_predicts(row, tmp_path):
    model = row.model(device="cuda")
    with pytest.raises(ConnectionAbortedError):
        helpers.run_fit(model, row.method, tmp_path, callbacks=[Crash(4)])
    posterior = helpers.run_fit(row.model(device="cuda"), row.method, tmp_path, resume=True)
    one, two = (helpers.run_predict(model, posterior) for _ in range(2))
    assert torch.equal(one.logits, two.logits)
    load_adapter(model, tmp_path / "adapter")
    loaded = load_posterior(model, tmp_path / "adapter")
    assert {tensor.device.type for tensor in loaded.tensors().values()} == {"cuda"}
    torch.testing.assert_close(helpers.run_predict(model, loaded).probs, one.probs)


def gaussian(model):
    mean = copied(model)
    return DiagonalGaussian(mean, {name: torch.full_like(value, 0.1) for name, value in mean.items()})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stacked_draws_are_the_loops_and_find_their_room(dtype):
    model = helpers.tiny_model(dtype=dtype, adapter=dtype, device="cuda")
    posterior = gaussian(model)
    batch = collate(helpers.make_rows(5), 0)

    def drawn(how):
        return posterior.drawn(12, torch.Generator("cuda").manual_seed(0), how)

    stack, tolerance = drawn(Drawing()), 1e-4 if dtype == "float32" else 0.05
    with torch.no_grad():
        loop = drawn(Drawing(stacked=False)).logits(model, batch, class_logits)
        for _ in range(2):  # the first finds out what a token takes
            torch.testing.assert_close(stack.logits(model, batch, class_logits), loop, rtol=tolerance, atol=tolerance)
    assert stack._tokens > batch["input_ids"].numel() * 12


def test_stacked_draws_go_on_where_the_gpus_memory_runs_out():
    model = helpers.tiny_model(device="cuda")
    posterior = gaussian(model)
    batch, most = collate(helpers.make_rows(5), 0), []

    def forward(model, batch):
        most.append(len(batch["input_ids"]) // 5)
        if most[-1] > 3:
            torch.empty(2**50, device="cuda")  # more than there is
        return class_logits(model, batch)

    stack = posterior.drawn(12, torch.Generator("cuda").manual_seed(0), Drawing(tokens=10**6))
    with torch.no_grad():
        assert stack.logits(model, batch, forward).shape[0] == 12
    assert most == [12, 6, 3, 3, 3, 3]


def test_where_the_gpus_memory_runs_out_for_one_draw_half_as_many_rows_go_on():
    model = helpers.tiny_model(device="cuda")
    posterior, seen = gaussian(model), []
    expected = helpers.run_predict(model, posterior, samples=12)

    def check(layer, args):
        seen.append(len(args[0]))
        if seen[-1] > 2:
            torch.empty(2**50, device="cuda")  # more than there is

    model.get_submodule("base_model.model.model.layers.1").input_layernorm.register_forward_pre_hook(check)
    found = helpers.run_predict(model, posterior, samples=12)
    torch.testing.assert_close(found.probs, expected.probs, rtol=1e-4, atol=1e-4)
    assert seen[:3] == [7, 4, 2]
