"""Warning signs in what training logged: each has a sentence that says what to change, and good runs have none."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from varlora.diagnosis import signs

GOOD = {
    "held_back": 0.9,
    "hessian_over_first": 1.02,
    "signal_above_noise": 0.3,
    "loss_at_mean": 0.4,
    "loss_under_noise": 0.5,
    "loss_of_chance": 1.0,
}


def test_a_good_run_has_none() -> None:
    assert signs(GOOD) == []
    assert signs({"loss": 0.3}) == []  # of a method without noise


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"held_back": 0.3}, "held back to 30%"),
        ({"hessian_over_first": 1.5}, "raise `hess_init`"),
        ({"hessian_over_first": 0.5}, "raise `hess_init`"),
        ({"loss_at_mean": 0.99, "loss_under_noise": 1.2}, "hardly anything was learned"),
        ({"loss_at_mean": 0.99, "loss_under_noise": 1.2}, "0.990, is hardly better than chance, 1.000"),
        ({"loss_at_mean": 1.7, "loss_under_noise": 1.8}, "1.700, is no better than chance, 1.000"),
        ({"loss_under_noise": 0.8}, "more than half of what training gained"),
        ({"loss_at_mean": 0.0, "loss_under_noise": 0.01}, "learned by heart"),
        ({"signal_above_noise": 0.95}, "nearly a point"),
        ({"signal_above_noise": 0.01}, "most of the adapter is noise"),
    ],
)
def test_each_sign_has_its_sentence(change: Mapping[str, float], said: str) -> None:
    (sentence,) = signs({**GOOD, **change})
    assert said in sentence


def test_a_hessian_that_is_meant_to_move_is_no_sign() -> None:
    assert signs({**GOOD, "hessian_over_first": 3.0, "hessian_of_run": 1.0}) == []
