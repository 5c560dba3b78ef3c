"""Settings of the library's tests: the oracles beside them, quiet property tests."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

settings.register_profile("kdlosses", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("kdlosses")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _on_device(device):
    """Tests create their tensors on the device of ``--device``; numpy needs copies on the CPU."""
    if device.type == "simulated":
        from simulated import simulated_device

        with simulated_device():
            yield
    elif device.type == "cpu":
        yield
    else:
        with device:
            yield
