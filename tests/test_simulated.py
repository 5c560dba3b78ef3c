"""``--device simulated`` notices tensors on the wrong device, and what it runs is right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

NOTICES = """
import sys
sys.path.insert(0, "tests/devices")
import numpy, torch
from simulated import simulated_device
with simulated_device():
    x = torch.randn(3, 4, requires_grad=True)
    assert x.device.type == "simulated"
    (x * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert x.grad.device.type == "simulated"
    assert x.grad.tolist() == [[1.0, 2.0, 3.0, 4.0]] * 3
    for wrong in (lambda: x + torch.ones(4, device="cpu"), lambda: numpy.asarray(x.detach())):
        try:
            wrong()
        except RuntimeError:
            continue
        raise AssertionError("a tensor on the wrong device was not noticed")
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=280,
        check=False,
    )


def test_a_tensor_on_the_wrong_device_is_noticed() -> None:
    done = run("-c", NOTICES)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_librarys_known_numbers_hold_on_another_device() -> None:
    done = run("-m", "pytest", "-q", "--device", "simulated", "tests/kdlosses/test_numbers.py")
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "failed" not in done.stdout
