"""The measure of the other tests can fail."""

from __future__ import annotations

import pytest
import torch

from .reference import assert_close_to_reference


def test_reference_close_is_strict() -> None:
    """The measure itself: three units of rounding are seen."""
    value = torch.tensor([1.0, 2.0, 3.0])
    assert_close_to_reference(value, value.double(), value)
    with pytest.raises(AssertionError):
        assert_close_to_reference(value * (1 + 6e-7), value.double(), value)
