"""The closed forms on a GPU, by Triton's kernels and by torch."""

from __future__ import annotations

import pytest
import torch
from optim import test_ivon_equations as equations

from varlora.optim import bucket

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def device() -> str:
    return "cuda"


@pytest.fixture(params=["triton", "torch"], autouse=True)
def _arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(bucket, "kernels_for", lambda device: None)
    elif bucket.kernels_for(torch.device("cuda")) is None:
        pytest.skip("Triton does not run here")


test_linear_regression = equations.test_linear_regression_reaches_the_mean_field_posterior
test_price_on_any_quadratic = equations.test_price_is_unbiased_on_any_quadratic
test_price_in_batches = equations.test_price_does_not_depend_on_how_the_loss_is_batched
test_gradsq_on_a_well_specified_model = equations.test_gradsq_is_unbiased_on_a_well_specified_model_whatever_the_batch
test_gradsq_and_the_batch_size = equations.test_gradsq_is_scaled_by_the_batch_size_and_not_by_ess
