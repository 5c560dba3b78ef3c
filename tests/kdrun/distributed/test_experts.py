"""The load-balancing loss of a student with experts, over processes as over micro-batches."""

from __future__ import annotations

import json
from pathlib import Path

import experts
import pytest
from commands import script_in_processes
from safetensors.torch import load_file

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_f5_processes_equal_one_that_accumulates(tmp_path: Path, kind: str) -> None:
    experts.make(tmp_path / "experts")
    for processes in (1, experts.PROCESSES):
        for done in script_in_processes(processes, experts.__file__, tmp_path, kind):
            assert done.returncode == 0, done.stderr[-4000:]
    one, several = (load_file(tmp_path / f"{kind}-{n}.safetensors") for n in (1, 2))
    before = load_file(tmp_path / "experts" / "model.safetensors")
    router = "model.layers.0.mlp.gate.weight"
    assert set(one) == set(several)
    for name, expected in one.items():
        assert (several[name] - expected).abs().max() <= 1e-5, name
    stored = next(weight for name, weight in before.items() if name.endswith("gate.weight"))
    assert (one[router] - stored).abs().max() > 1e-3
    lines, others = (
        json.loads((tmp_path / f"{kind}-{n}.json").read_text(encoding="utf-8")) for n in (1, 2)
    )
    assert len(lines) == 2
    for line, other in zip(lines, others, strict=True):
        assert line == pytest.approx(other, rel=1e-5)
