"""Shared by all tests: a fixed seed, and NaN in every uninitialized tensor."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# Drawn sizes differ a thousandfold; the autouse fixture has nothing that must be made anew.
_PROPERTIES = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("default", max_examples=100, derandomize=True, **_PROPERTIES)
settings.register_profile("thorough", max_examples=2000, **_PROPERTIES)
settings.register_profile("interpreter", max_examples=3, derandomize=True, **_PROPERTIES)
settings.load_profile("interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else "default")


@pytest.fixture(autouse=True)
def seeded_and_poisoned() -> Iterator[None]:
    """A kernel that leaves an output element unwritten shows it as NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads within the test, whatever the machine's default; but not in the interpreter."""
    before = torch.get_num_threads()
    if os.environ.get("TRITON_INTERPRET") != "1":  # which has one, that others would slow down
        torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
