"""Settings of the library's tests: the oracles beside them, quiet property tests."""

import sys
import textwrap
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


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put distributions with entry points (and modules) on sys.path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made = []

    def add(distribution, entry_points, group="losses", **modules):
        folder = tmp_path / f"{distribution.replace('-', '_')}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n", encoding="utf-8"
        )
        lines = "\n".join(f"{name} = {value}" for name, value in entry_points.items())
        text = f"[kdlosses.{group}]\n{lines}\n"
        (folder / "entry_points.txt").write_text(text, encoding="utf-8")
        for module, text in modules.items():
            (tmp_path / f"{module}.py").write_text(textwrap.dedent(text), encoding="utf-8")
            made.append(module)
        return folder

    yield add
    for module in made:
        sys.modules.pop(module, None)
