"""What tests of kernels share: memory that holds NaN until it is written, and a relative error."""

from contextlib import contextmanager

import pytest
import torch


@contextmanager
def poisoned_memory():
    """Memory that a kernel forgets to write holds NaN."""
    empty, like, strided = torch.empty, torch.empty_like, torch.empty_strided

    def fill(tensor):
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -7)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
        patch.setattr(torch, "empty_like", lambda *a, **k: fill(like(*a, **k)))
        patch.setattr(torch, "empty_strided", lambda *a, **k: fill(strided(*a, **k)))
        yield


@pytest.fixture
def poison():
    return poisoned_memory


@pytest.fixture
def poisoned():
    with poisoned_memory():
        yield


def require_near(actual, expected, tolerance, name=""):
    """The error of a whole tensor over its size is below the tolerance."""
    assert actual.isfinite().all(), f"{name} holds values that are not finite"
    error = (actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error < tolerance or torch.equal(actual.double(), expected), f"{name}: {error:.2e}"


@pytest.fixture
def assert_near():
    return require_near
