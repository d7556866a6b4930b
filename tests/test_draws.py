"""The fixed models of a posterior: how many, which, and that their average is what `draw_logits` averages."""

from __future__ import annotations

import pytest
import torch
from helpers import seeded
from torch import nn

from varlora.draws import fixed_models, parts
from varlora.errors import VarloraError
from varlora.posterior import DiagonalGaussian, Dropout, Linearised, Mixture, Point, Pruned, Tempered


def gaussian(mean: float = 1.0, std: float = 0.5) -> DiagonalGaussian:
    return DiagonalGaussian({"weight": torch.tensor([[mean, 2.0]])}, {"weight": torch.full((1, 2), std)})


POINT = Point({"weight": torch.tensor([[1.0, 2.0]])})


def entered(posterior, n, seed=0):
    """Return (weight, the layer's values) of each model, and check that the layer is afterwards what it was."""
    layer = nn.Linear(2, 1, bias=False)
    before = layer.weight.detach().clone()
    found = []
    for weight, model in fixed_models(posterior, layer, n, seeded(seed)):
        with model():
            found.append((weight, tuple(layer.weight[0].tolist())))
        assert torch.equal(layer.weight, before)
    return found


def forward(layer, batch):
    return layer(batch).detach()


@pytest.mark.parametrize(
    "posterior",
    [
        gaussian(),
        POINT,
        Dropout({"weight": torch.ones(1, 2)}, {"weight": torch.tensor(0.5)}),
        gaussian().prune(0.5),
        Mixture([gaussian(), gaussian(-3.0)]),
        Mixture([POINT, gaussian()]),
        Mixture([Mixture([POINT, gaussian()]), gaussian(7.0)]),
    ],
)
@pytest.mark.parametrize("n", [0, 8])
def test_they_are_the_models_that_predictions_are_made_of(posterior, n):
    """With a number of draws that the members share evenly, the averages are the same."""
    batch = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    logits = posterior.draw_logits(nn.Linear(2, 1, bias=False), batch, n, seeded(3), forward)[..., 0]
    models = entered(posterior, n, seed=3)
    assert sum(weight for weight, _ in models) == pytest.approx(1.0)
    if n:
        average = sum(weight * torch.tensor(values) for weight, values in models)
        torch.testing.assert_close(average, logits.mean(0))


def test_one_model_is_enough_where_all_draws_are_the_same():
    for posterior in (POINT, POINT.prune(0.5, "magnitude"), Tempered(POINT, 2.0, 2.0)):
        assert len(entered(posterior, 10)) == 1
    assert len(entered(gaussian(), 0)) == 1
    assert len({values for _, values in entered(gaussian(), 4)}) == 4


def test_each_member_has_an_equal_share_whatever_the_number_of_draws():
    mixture = Mixture([gaussian(10.0), gaussian(20.0), POINT])
    for n in (0, 1, 4, 9):
        models = entered(mixture, n)
        assert sum(weight for weight, values in models if values[0] > 15) == pytest.approx(1 / 3)
        assert sum(weight for weight, values in models if values == (1.0, 2.0)) == pytest.approx(1 / 3)
    assert len(entered(mixture, 9)) == 3 + 3 + 1


def test_what_acts_on_class_logits_alone_has_no_part():
    plain = entered(gaussian(), 3)
    assert entered(Tempered(gaussian(), 5.0, 5.0), 3) == plain
    assert entered(Linearised(gaussian()), 3) == plain
    assert entered(Tempered(Linearised(gaussian()), 5.0, 5.0), 0) == entered(gaussian(), 0)


def test_a_seed_gives_the_same_models():
    assert entered(gaussian(), 3) == entered(gaussian(), 3)
    assert entered(gaussian(), 3) != entered(gaussian(), 3, seed=1)
    assert entered(gaussian(), 2) == [(1 / 2, values) for _, values in entered(gaussian(), 5)[:2]]


def test_parts_are_all_that_is_within():
    nested = Tempered(Mixture([Linearised(gaussian()), POINT.prune(0.5, "magnitude")]), 2.0, 2.0)
    kinds = [type(part) for part in parts(nested)]
    assert kinds == [Tempered, Mixture, Linearised, DiagonalGaussian, Pruned, Point]


def test_a_negative_number_is_refused():
    with pytest.raises(VarloraError, match="`n`"):
        fixed_models(gaussian(), nn.Linear(2, 1), -1, seeded())
