"""The trainer's tests run on the device of ``--device``."""

from __future__ import annotations

from typing import Any

import bare
import pytest


@pytest.fixture(autouse=True)
def _on_device(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bare, "USE_CPU", device.type == "cpu")
