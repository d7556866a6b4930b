"""Every method works where the adapter lies on two devices, as with a `device_map` over several GPUs."""

from __future__ import annotations

import pytest
from conformance.two_devices import ROWS
from everywhere.other_device import Elsewhere


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_method_comes_to_what_it_comes_to_on_one(row, other_device: Elsewhere):
    other_device("conformance.two_devices", "as_on_one", row.name)
