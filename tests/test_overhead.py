"""What a training step costs: each method trains as it does alone, parts are told apart, and the model stays."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

import helpers
import pytest
import torch

from varlora.data import collate
from varlora.errors import VarloraError
from varlora.methods import METHODS, AdamW, Blob, Ivon, Method
from varlora.model import LoRA, class_logits, load_model
from varlora.overhead import PAPER_SECONDS, Cost, Overhead, measure_overhead, to_table
from varlora.params import trainable
from varlora.trainer import class_loss

DRAW, MOVE = 0.02, 0.01


@dataclass(frozen=True)
class Watched(Method):
    """Another method, whose optimizers are kept to look at."""

    name: ClassVar[str] = "watched"
    of: Method
    made: list[Any] = field(default_factory=list)

    def optimizer(self, params, num_examples, batch_size, seed):
        self.made.append(self.of.optimizer(params, num_examples, batch_size, seed))
        return self.made[-1]

    def training(self, model, optimizer):
        return self.of.training(model, optimizer)

    def posterior(self, trained):
        raise NotImplementedError


class Slow(torch.optim.SGD):
    """An optimizer whose draw and step take known times."""

    def train(self):
        time.sleep(DRAW)

    def step(self, closure=None):
        time.sleep(MOVE)


@dataclass(frozen=True)
class Sleeping(Watched):
    of: Method = field(default_factory=AdamW)

    def optimizer(self, params, num_examples, batch_size, seed):
        return Slow(params.values(), lr=0.0)


@dataclass(frozen=True)
class Failing(Watched):
    """A method whose step fails, with a draw in the parameters."""

    of: Method = field(default_factory=Ivon)

    def optimizer(self, params, num_examples, batch_size, seed):
        optimizer = super().optimizer(params, num_examples, batch_size, seed)

        def step():
            raise ConnectionAbortedError

        optimizer.step = step
        return optimizer


def measure(model, **settings):
    return measure_overhead(model, helpers.make_rows(12), **{"pad_token_id": 0, "rounds": 2, "warmup": 1, **settings})


def trained_alone(method: Method, steps: int) -> dict[str, torch.Tensor]:
    """The slow twin: a plain loop with one method, on a model of its own."""
    model, rows = helpers.tiny_model().train(), helpers.make_rows(12)
    params = trainable(model)
    optimizer: Any = method.optimizer(params, len(rows), 4, 0)
    for step in range(steps):
        batch = collate(rows[4 * (step % 3) :][:4], 0)
        if hasattr(optimizer, "train"):
            optimizer.train()
        optimizer.zero_grad()
        (class_loss(class_logits(model, batch), batch["labels"]) / 4).backward()
        optimizer.step()
    return helpers.bits(model)


@pytest.mark.parametrize("name", ["adamw", "ivon"])
def test_each_method_trains_as_it_does_alone(name):
    watched = {one: Watched(METHODS[one]()) for one in ("adamw", "ivon")}
    measure(helpers.tiny_model(), methods=watched, rounds=4, warmup=1)
    (optimizer,) = watched[name].made
    values = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    alone = trained_alone(METHODS[name](), steps=5)
    assert not helpers.same(alone, helpers.bits(helpers.tiny_model()))
    for value, expected in zip(values, alone.values(), strict=True):
        assert torch.equal(value, expected)


def test_a_method_whose_training_passes_differ_has_them_in_its_turn_alone():
    drawn: list[str] = []

    class Counting(Watched):
        def optimizer(self, params, num_examples, batch_size, seed):
            optimizer = super().optimizer(params, num_examples, batch_size, seed)
            noise = optimizer.noise
            optimizer.noise = lambda name, x: (drawn.append(name), noise(name, x))[1]
            return optimizer

    blob, model = Counting(Blob()), helpers.tiny_model()
    measure(model, methods={"adamw": AdamW(), "blob": blob})  # three rounds, one of them to warm up
    assert sorted(drawn) == sorted(3 * list(blob.made[0].G))
    assert not any(module._forward_hooks for module in model.modules())


def snapshot(model):
    return {
        "identity": {name: id(p) for name, p in model.named_parameters()},
        "bits": {name: p.detach().clone() for name, p in model.named_parameters()},
        "modes": [module.training for module in model.modules()],
        "grad": [p.grad for p in model.parameters()],
        "random": torch.get_rng_state(),
    }


@pytest.mark.parametrize("how", ["done", "in a step", "between rounds"])
def test_the_model_and_the_global_random_state_are_left_as_they_were(how):
    model = helpers.tiny_model(dropout=0.5)
    next(module for module in model.modules() if isinstance(module, torch.nn.Dropout)).train()  # a mode of its own
    before = snapshot(model)

    def stop(rounds):
        raise ConnectionAbortedError

    if how == "done":
        measure(model)
    else:
        settings = {"methods": {"failing": Failing()}} if how == "in a step" else {"progress": stop}
        with pytest.raises(ConnectionAbortedError):
            measure(model, **settings)
    after = snapshot(model)
    assert helpers.same(before.pop("bits"), after.pop("bits"))
    assert torch.equal(before.pop("random"), after.pop("random"))
    assert before == after


def test_parts_are_told_apart():
    overhead = measure(helpers.tiny_model(), methods={"adamw": AdamW(), "slow": Sleeping()}, rounds=3)
    slow, adamw = overhead.costs["slow"], overhead.costs["adamw"]
    assert DRAW <= min(slow.seconds["sampling"]) < DRAW + MOVE
    assert MOVE <= min(slow.seconds["step"]) < DRAW
    assert adamw.seconds["sampling"] == (0.0, 0.0, 0.0)
    assert min(adamw.seconds["step"]) > 0
    for cost in (slow, adamw):
        for *parts, total in zip(*cost.seconds.values()):
            assert sum(parts) == pytest.approx(total)
            assert parts[1] > 0
    assert overhead.base == "adamw"


def test_the_optimizers_state_is_counted_in_bytes():
    model = helpers.tiny_model()
    overhead = measure(model)
    numel, tensors = sum(p.numel() for p in trainable(model).values()), len(trainable(model))
    assert overhead.parameters == numel
    assert overhead.costs["adamw"].state_bytes == 4 * (2 * numel + tensors)  # two moments, and a count for each tensor
    assert overhead.costs["ivon"].state_bytes == 4 * (3 * numel + tensors)  # mean, momentum, Hessian, and a count
    assert overhead.costs["ivon"].peak_bytes is None


def test_a_round_is_reported_when_it_is_done_and_none_starts_after_the_time_is_up():
    rounds: list[int] = []
    overhead = measure(helpers.tiny_model(), rounds=5, max_seconds=0, progress=rounds.append)
    assert overhead.rounds == sum(rounds) == 1


def made(**seconds: tuple[float, ...]) -> Cost:
    return Cost({**seconds, "total": tuple(map(sum, zip(*seconds.values())))}, 8, None)


def test_shares_and_overheads_follow_from_the_times():
    paper = made(**{part: (value,) for part, value in PAPER_SECONDS.items()})
    assert paper.share == pytest.approx(2.8 / 319.1)
    adamw = made(sampling=(0.0, 0.0, 0.0), forward_backward=(9.0, 7.0, 8.0), step=(1.0, 1.0, 2.0))
    ivon = made(sampling=(1.0, 1.0, 3.0), forward_backward=(9.0, 8.0, 7.0), step=(2.0, 2.0, 2.0))
    overhead = Overhead({"adamw": adamw, "ivon": ivon}, "CPU", 4, 20.0, 1)
    assert (adamw.median("total"), ivon.median("total")) == (10.0, 12.0)
    assert overhead.relative("ivon") == pytest.approx(0.2)
    assert overhead.relative("adamw") == 0
    assert ivon.share == pytest.approx(3 / 12)
    assert ivon.quartiles("sampling") == (1.0, 2.0)
    assert paper.quartiles("step") == (0.001, 0.001)


def test_results_are_plain_values_and_a_table():
    rows = helpers.make_rows(12)
    overhead = measure(helpers.tiny_model())
    found = overhead.to_dict()
    assert json.loads(json.dumps(found)) == found
    lengths = [max(len(row.input_ids) for row in rows[at : at + 4]) for at in (0, 4, 8)]
    assert found["tokens_per_batch"] == pytest.approx(4 * sum(lengths) / 3)
    ivon = found["methods"]["ivon"]
    assert list(ivon["seconds"]) == ["sampling", "forward_backward", "step", "total"]
    for times in ivon["seconds"].values():
        assert 0 < times["q1"] <= times["median"] <= times["q3"]
    assert ivon["relative"] == overhead.relative("ivon")
    assert ivon["peak_bytes"] is None
    table = to_table(overhead)
    assert [column.header for column in table.columns] == ["median (quartiles)", "adamw", "ivon"]
    assert next(table.columns[1].cells).startswith("0.000")
    assert list(table.columns[2].cells)[-1] == "not measured"
    assert "CPU" in str(table.title)
    beside = to_table(overhead, beside_paper=True)
    assert [list(column.cells) for column in beside.columns[:3]] == [list(column.cells) for column in table.columns]
    told = ["1.8", "316.3", "1.0", "319.1", "0.88", "not given", "not given", "not given"]  # the end of its section 3
    assert list(beside.columns[3].cells) == told


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "Expected `rounds` to be a whole number >= 1, but got 0"),
        ({"warmup": -1}, "Expected `warmup` to be a whole number >= 0, but got -1"),
        ({"batch_size": 0}, "Expected `batch_size` to be a whole number >= 1, but got 0"),
        ({"batch_size": 13}, "Expected `rows` to fill a batch of 13, but got 12"),
        ({"methods": {}}, "Expected `methods` to hold methods to compare, but got none"),
    ],
)
def test_an_argument_out_of_its_range_is_named(settings, message):
    with pytest.raises(VarloraError, match=message):
        measure(helpers.tiny_model(), **settings)


def test_rows_need_labels_and_the_model_an_adapter():
    with pytest.raises(VarloraError, match="a label in each row, but 12 of 12 have none"):
        measure_overhead(helpers.tiny_model(), helpers.make_rows(12, labelled=False), pad_token_id=0)
    frozen, _ = load_model(helpers.base_folder(), lora=None, device="cpu")
    with pytest.raises(VarloraError, match="nothing in it requires a gradient"):
        measure(frozen)
    meta, _ = load_model(helpers.base_folder(), lora=LoRA(rank=2), device="cpu")
    with pytest.raises(VarloraError, match="on a CPU or a CUDA device, but it is on meta"):
        measure(meta.to("meta"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_peak_is_measured_and_the_generators_come_back():
    model = helpers.tiny_model(dropout=0.5, device="cuda")
    before = torch.cuda.get_rng_state()
    overhead = measure(model)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    base = sum(p.numel() * p.element_size() for p in model.parameters())
    for cost in overhead.costs.values():
        assert cost.peak_bytes is not None
        assert cost.peak_bytes > base + cost.state_bytes
        assert min(cost.seconds["forward_backward"]) > 0
    assert overhead.device == torch.cuda.get_device_name()
