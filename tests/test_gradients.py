"""Rows' gradients of their class logits, against autograd of one row and one class at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import helpers
import pytest
import torch
from torch import Tensor, nn

from varlora.data import collate
from varlora.demo.run import one_thread
from varlora.errors import VarloraError
from varlora.gradients import one_pass
from varlora.model import class_logits
from varlora.params import trainable


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


class Net(nn.Module):
    """Two linear layers that train and one that does not, with what is not linear between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 5, bias=False), nn.Linear(6, 4)
        self.frozen = nn.Linear(5, 6).requires_grad_(False)
        self.b.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Every position counts, each for itself and through the others; (B, T, 3) -> (B, 4)."""
        hidden = torch.tanh(self.frozen(torch.tanh(self.a(x))).cumsum(1))
        y = self.b(hidden)  # (B, T, 4)
        return y[:, -1] + y.square().mean(1)


def x(count: int = 5) -> Tensor:
    return torch.randn(count, 7, 3, generator=torch.Generator().manual_seed(1))


def forward(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def jacobian(model: nn.Module, batch: Any, of: Any = forward) -> dict[str, Tensor]:
    with one_pass(model, batch, of) as found:
        return found.jacobian()


def adapter(**settings: Any) -> Any:
    """The tiny model with a B that is not zero, so that A has gradients too."""
    model = helpers.tiny_model(**settings)
    with torch.no_grad():
        for name, p in trainable(model).items():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return model


# --- a small network ---


def test_jacobian_is_that_of_autograd() -> None:
    net = Net()
    expected = torch.func.jacrev(lambda values: torch.func.functional_call(net, values, x()))(dict(trainable(net)))
    found = jacobian(net, x())
    assert list(found) == ["a.weight", "b.weight"]
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])  # (B, C, out, in)


def test_one_position_is_enough() -> None:
    batch = x()[:, :1]
    net = Net()
    expected = torch.func.jacrev(lambda values: torch.func.functional_call(net, values, batch))(dict(trainable(net)))
    torch.testing.assert_close(jacobian(net, batch), expected)


def test_weight_gradients_are_those_of_the_combination_of_logits() -> None:
    net, cotangent = Net(), torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    with one_pass(net, x(), forward) as found:
        gradients = found.weight_gradients(cotangent)
        again = found.weight_gradients(cotangent)  # as often as one likes
    for row in range(5):
        logits = net(x()[row : row + 1])[0]
        one = torch.autograd.grad(logits @ cotangent[row], list(trainable(net).values()))
        for value, repeated, expected in zip(gradients.values(), again.values(), one):
            torch.testing.assert_close(value[row], expected)
            assert torch.equal(repeated, value)


def test_inputs_and_gradients_of_outputs_make_the_weights_gradients() -> None:
    """Σₜ g aᵀ, and a are the layer's own inputs."""
    net, cotangent = Net(), torch.ones(5, 4)
    with one_pass(net, x(), forward) as found:
        g, weights = found.backward(cotangent), found.weight_gradients(cotangent)
    assert torch.equal(found.inputs["a.weight"], x())
    assert g["a.weight"].shape == (5, 7, 5)
    for name in g:
        summed = torch.einsum("bto,bti->boi", g[name], found.inputs[name])
        torch.testing.assert_close(weights[name], summed)


def test_a_layer_that_some_answers_do_not_depend_on_has_the_gradient_zero() -> None:
    def half(model: nn.Module, batch: Tensor) -> Tensor:
        a, b = model[0](batch)[:, -1], model[1](batch)[:, -1]
        return torch.stack([a[:, 0], b[:, 0]], 1)

    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False))
    found = jacobian(model, x(), half)
    assert (found["0.weight"][:, 1] == 0).all()
    assert (found["1.weight"][:, 0] == 0).all()
    torch.testing.assert_close(found["0.weight"][:, 0, 0], x()[:, -1])


# --- the adapter of a language model ---


def test_jacobian_of_an_adapter_is_that_of_each_row_alone() -> None:
    """Of rows of different lengths and numbers of answers, in one padded batch and one by one without padding."""
    model, rows = adapter(), helpers.make_rows(6)
    assert len({len(row.input_ids) for row in rows}) > 2
    found = jacobian(model, collate(rows, 0), class_logits)
    params = trainable(model)
    assert list(found) == list(params)
    for number, row in enumerate(rows):
        logits = class_logits(model, collate([row], 0))[0]  # (c,)
        for answer in range(5):
            if answer < len(logits):
                gradients = torch.autograd.grad(logits[answer], list(params.values()), retain_graph=True)
            else:
                gradients = [torch.zeros_like(p) for p in params.values()]
            for name, expected in zip(params, gradients):
                torch.testing.assert_close(found[name][number, answer], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("nothing", [0.0, float("inf"), float("nan")])
def test_the_cotangent_of_an_answer_that_a_row_lacks_does_not_matter(nothing: float) -> None:
    model, batch = adapter(), collate(helpers.make_rows(4), 0)
    missing = ~batch["answer_mask"]
    assert missing.any()
    cotangent = torch.randn(missing.shape, generator=torch.Generator().manual_seed(2))
    with one_pass(model, batch, class_logits) as found:
        expected = found.weight_gradients(cotangent)
        changed = found.weight_gradients(cotangent.masked_fill(missing, nothing))
    assert helpers.same(changed, expected)
    assert all(value.isfinite().all() for value in changed.values())


def test_an_answer_that_is_ruled_out_has_no_gradient_however_it_is_ruled_out() -> None:
    """Adding -inf passes the gradient on, where filling with it does not."""
    ruled_out = torch.zeros(5, 4).index_fill_(1, torch.tensor([1]), -torch.inf)
    found = jacobian(Net(), x(), lambda model, batch: model(batch) + ruled_out)
    for name, value in jacobian(Net(), x()).items():
        assert (found[name][:, 1] == 0).all()
        assert torch.equal(found[name][:, [0, 2, 3]], value[:, [0, 2, 3]])


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16", "adapter": "bfloat16"}, {"dtype": "bfloat16"}], ids=str)
def test_jacobian_of_16_bit_models_is_in_32_bit(settings: dict[str, Any]) -> None:
    batch = collate(helpers.make_rows(4), 0)
    torch.manual_seed(0)
    expected = jacobian(adapter(), batch, class_logits)
    torch.manual_seed(0)
    found = jacobian(adapter(**settings), batch, class_logits)
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert (value - expected[name]).norm() < 0.1 * expected[name].norm()


# --- what is left behind ---


@pytest.mark.parametrize("recorded", [True, False], ids=["gradients on", "no_grad"])
def test_works_whether_or_not_gradients_are_recorded(recorded: bool) -> None:
    """Prediction runs under `no_grad`."""
    net, expected = Net(), jacobian(Net(), x())
    with torch.set_grad_enabled(recorded):
        torch.testing.assert_close(jacobian(net, x()), expected)
        assert torch.is_grad_enabled() is recorded


def test_gradients_of_parameters_are_untouched() -> None:
    net = Net()
    net.a.weight.grad = torch.full_like(net.a.weight, 7.0)
    before = helpers.bits(net)
    jacobian(net, x())
    assert (net.a.weight.grad == 7).all()
    assert net.b.weight.grad is None
    assert helpers.same(helpers.bits(net), before)


def test_no_hook_is_left() -> None:
    net = Net()
    with one_pass(net, x(), forward):
        pass
    assert hooks(net) == 0
    with pytest.raises(ZeroDivisionError), one_pass(net, x(), forward):
        raise ZeroDivisionError
    assert hooks(net) == 0


def test_no_hook_is_left_after_a_forward_pass_that_fails() -> None:
    def broken(model: nn.Module, batch: Tensor) -> Tensor:
        model(batch)
        raise ZeroDivisionError

    net = Net()
    with pytest.raises(ZeroDivisionError), one_pass(net, x(), broken):
        pass
    assert hooks(net) == 0


# --- what is refused ---


def test_a_bias_that_trains_is_refused() -> None:
    net = Net()
    net.b.bias.requires_grad_(True)
    with pytest.raises(VarloraError, match=r"weights of linear layers, .* but `b\.bias` is not"):
        jacobian(net, x())
    assert hooks(net) == 0


def test_a_weight_of_another_kind_of_layer_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.LayerNorm(4))
    with pytest.raises(VarloraError, match=r"`1\.weight` is not"):
        jacobian(model, x())


def test_a_layer_that_is_used_twice_is_refused() -> None:
    layer = nn.Linear(3, 3, bias=False)
    with pytest.raises(VarloraError, match="`weight` is used again"):
        jacobian(layer, x(), lambda model, batch: model(model(batch))[:, -1])
    assert hooks(layer) == 0


def test_a_layer_that_is_not_used_is_refused() -> None:
    net = Net()
    with pytest.raises(VarloraError, match=r"used once in a forward pass, but `b\.weight` is not"):
        jacobian(net, x(), lambda model, batch: model.a(batch)[:, -1])
    assert hooks(net) == 0
