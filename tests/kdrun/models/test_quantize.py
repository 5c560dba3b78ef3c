"""A teacher in 8 bits: almost the same distributions, in less memory, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from pair_configs import config_of

from kdrun.cli import cli
from kdrun.dry_run.report import dry_run
from kdrun.errors import InputError
from kdrun.models.heads import FrozenTeacher, find_split
from kdrun.models.pairs import find_pair, load_teacher
from kdrun.models.quantize import check_quantization

Distil = Callable[..., Path]
needs_torchao = pytest.mark.skipif(
    find_spec("torchao") is None, reason="the package torchao is not installed"
)
# What torchao asks of torch 2.13 while it is imported.
pytestmark = pytest.mark.filterwarnings("default")


INT8 = {"model__teacher_quantization": "int8"}


@needs_torchao
def test_the_teacher_says_almost_the_same_in_less_memory(tiny_pair: Any) -> None:
    plain, small = (
        load_teacher(find_pair(config.model), config.model)
        for config in (config_of(tiny_pair), config_of(tiny_pair, **INT8))
    )
    assert plain is not None
    assert small is not None
    ids = torch.arange(3, 60).unsqueeze(0)
    with torch.no_grad():
        p, q = (model(ids).logits.double().log_softmax(-1) for model in (plain, small))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert 1e-7 < kl < 1e-2
    kinds = {type(layer.weight).__name__ for layer in small.modules() if hasattr(layer, "weight")}
    assert "Int8Tensor" in kinds
    # Losses project with the head's own weight: it is a plain tensor, tied as it was.
    split = find_split(small)
    assert split.reason is None
    source = FrozenTeacher(small, split).source(ids, torch.ones_like(ids))
    assert torch.equal(source.weight, plain.get_output_embeddings().weight)
    assert source.hidden.shape == (1, 57, 32)


@needs_torchao
def test_a_run_distils_it_and_measures_against_it(
    distil: Distil, tiny_pair: Any, tmp_path: Path
) -> None:
    plain, small = (
        json.loads((distil(tmp_path / name, **given) / "summary.json").read_text("utf-8"))
        for name, given in (("plain", {}), ("small", INT8))
    )
    assert small["before"]["eval_ce"] == plain["before"]["eval_ce"]
    ours, theirs = (found["before"]["eval_forward_kl"] for found in (small, plain))
    assert ours != theirs
    assert ours == pytest.approx(theirs, rel=0.02)
    assert small["after"]["eval_forward_kl"] < small["before"]["eval_forward_kl"]


@needs_torchao
def test_the_dry_run_knows_its_bytes(tiny_pair: Any) -> None:
    config = config_of(tiny_pair, **INT8)
    model = load_teacher(find_pair(config.model), config.model)
    assert model is not None
    taken = 0
    for parameter in model.parameters():  # the tied head counts once
        parts = [parameter.qdata, parameter.scale] if hasattr(parameter, "qdata") else [parameter]
        taken += sum(part.numel() * part.element_size() for part in parts)
    assert dry_run(config).memory["weights of the teacher"] == taken
    plain = dry_run(config_of(tiny_pair)).memory["weights of the teacher"]
    assert plain is not None
    assert taken < plain


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model__teacher": None, "loss__kd_ratio": 0}, "without a teacher"),
        ({"model__teacher_cache": "somewhere"}, "remove one of the two"),
        ({"training__fsdp": True}, "cannot be sharded"),
    ],
)
def test_what_has_no_sense_is_refused(
    tiny_pair: Any, given: dict[str, Any], said: str, kind: str
) -> None:
    config = config_of(tiny_pair, model__teacher_quantization=kind, **given)
    with pytest.raises(InputError, match=said):
        check_quantization(config.model, config.training.fsdp)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.teacher_quantization=int8"], "int8 needs torchao"),
        (["model.teacher_quantization=nf4"], "nf4 needs bitsandbytes"),
        (["lora.rank=2", "lora.quantization=nf4"], "nf4 needs bitsandbytes"),
    ],
)
def test_without_its_package_it_is_refused_before_anything_loads(
    tiny_pair: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    settings: list[str],
    said: str,
) -> None:
    monkeypatch.setattr("kdrun.models.quantize.find_spec", lambda name: None)
    arguments = ["--teacher", str(tiny_pair.teacher), "--student", str(tiny_pair.student)]
    arguments += ["--data", str(tiny_pair.rows), "--output", str(tmp_path / "run")]
    for setting in settings:
        arguments += ["--set", setting]
    with pytest.raises(InputError, match=said + r".*kdlosses\[quantize\]"):
        CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert not (tmp_path / "run").exists()
