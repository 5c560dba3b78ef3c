"""Makes the peers' loader importable, and gives every parity test the same random batch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from peers import Batch


@pytest.fixture
def batch() -> Batch:
    return Batch.random()
