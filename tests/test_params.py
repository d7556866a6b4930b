"""Parameters by name, and other values in them for a while."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from varlora.errors import DamagedFileError
from varlora.params import check_same_parameters, swapped, trainable


def make(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    model[0].bias.requires_grad_(False)
    return model


def others(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.randn(p.shape) for name, p in trainable(model).items()}


def bits(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_trainable_leaves_out_what_is_frozen() -> None:
    model = make()
    assert list(trainable(model)) == ["0.weight", "1.weight", "1.bias"]
    assert trainable(model)["1.bias"] is model[1].bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swapped_gives_the_values_and_takes_them_back_bit_for_bit(dtype: torch.dtype) -> None:
    model = make(dtype)
    before, values = bits(model), others(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    with swapped(model, values):
        assert all(torch.equal(p, values[name].to(dtype)) for name, p in trainable(model).items())
        assert [p.data_ptr() for p in model.parameters()] == pointers
        with swapped(model, {"1.bias": torch.ones(2)}):  # some of them only, and nested
            assert torch.equal(model[1].bias, torch.ones(2, dtype=dtype))
            assert torch.equal(model[0].weight, values["0.weight"].to(dtype))
        assert torch.equal(model[1].bias, values["1.bias"].to(dtype))
    assert same(bits(model), before)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(p.dtype == dtype for p in model.parameters())


def test_swapped_takes_the_values_back_after_an_exception() -> None:
    model = make()
    before = bits(model)
    with pytest.raises(KeyboardInterrupt), swapped(model, others(model)):
        raise KeyboardInterrupt
    assert same(bits(model), before)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_swapped_keeps_the_grad_mode(mode: type) -> None:
    model = make()
    before = bits(model)
    with mode():
        expected = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with swapped(model, others(model)):
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == expected
            assert model(torch.ones(1, 3)).requires_grad == expected[0]
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == expected
    assert same(bits(model), before)
    model(torch.ones(1, 3)).sum().backward()  # as if nothing had been
    assert all(p.requires_grad and not p.is_inference() and p.grad is not None for p in trainable(model).values())


def test_swapped_takes_views_of_the_model_itself() -> None:
    model = make()
    before = bits(model)
    with swapped(model, {"0.weight": model[0].weight.detach()}):
        assert torch.equal(model[0].weight, before[0])
    assert same(bits(model), before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"2.weight": torch.zeros(1)},
            r"1 of its tensors are not in .*, or are frozen there, e\.g\. `2\.weight`",
        ),
        ({"0.bias": torch.zeros(4)}, "not in the model"),  # frozen
        ({"1.bias": torch.zeros(3)}, r"`1\.bias` has shape \(3,\) where the model has \(2,\)"),
        ({"1.bias": torch.zeros(())}, r"has shape \(\) where"),  # would broadcast
        ({"0.weight": torch.zeros(4, 3), "1.bias": torch.zeros(1)}, r"has shape \(1,\)"),
    ],
)
def test_swapped_refuses_other_names_and_shapes(values: dict[str, Tensor], message: str) -> None:
    model = make()
    before = bits(model)
    with pytest.raises(DamagedFileError, match=message), swapped(model, values):
        pass
    assert same(bits(model), before)


def test_check_same_parameters_reports_all_at_once() -> None:
    parameters = {"a": torch.zeros(2), "b": torch.zeros(3)}
    check_same_parameters(parameters, {"b": torch.ones(3), "a": torch.ones(2)}, "the posterior")
    with pytest.raises(DamagedFileError) as error:
        check_same_parameters(parameters, {"b": torch.ones(4), "c": torch.ones(1)}, "the posterior")
    message = str(error.value)
    assert message.startswith("Expected the posterior to be of this model")
    for part in ("missing in it, e.g. `a`", "not in the model, or are frozen there, e.g. `c`", "`b` has shape (4,)"):
        assert part in message
