"""Heads spread over two and three gloo processes give the losses and gradients of one."""

import re
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
WORKER = Path(__file__).with_name("worker.py")


@pytest.mark.parametrize("processes", [2, 3])
def test_every_additive_loss(processes, torchrun):
    done = torchrun(processes, WORKER)
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(re.findall(r"(\d+) losses", done.stderr)[0]) >= 10
