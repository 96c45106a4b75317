"""Settings and fixtures that all tests share."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# The same examples every time; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("explore", settings.get_profile("repeatable"), derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# Without a GPU the Triton kernels are tested in Triton's interpreter. Triton asks when it is imported, which torch's
# compiler does, which rarefy imports.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    # Tiny networks give reason for most of them. Not in pyproject.toml: it would import rarefy before the line above.
    config.addinivalue_line("filterwarnings", "ignore::rarefy.GuardWarning")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """No test depends on which ran before it."""
    torch.manual_seed(0)
