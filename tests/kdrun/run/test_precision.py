"""Mixed precision: what is stored in which type, and that the student learns as in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from commands import kdrun_in_processes
from cut_runs import cut_back
from safetensors.torch import load_file

from kdrun.cli import cli
from kdrun.config.load import load_config
from kdrun.errors import InputError
from kdrun.run.precision import settle_precision

STEPS = 60
SMALL = {  # updates below half a unit in the last place of a bfloat16 weight
    "optimizer__lr": 2e-4,
    "optimizer__scheduler": "constant",
    "training__max_steps": STEPS,
    "training__batch_size": 8,
    "training__logging_steps": STEPS,
}
ADAPTERS = {"lora__rank": 4, "optimizer__lr": 2e-3}


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return found


def way(folder: Path) -> float:
    """How far the held-out cross-entropy came down."""
    summary = summary_of(folder)
    return float(summary["before"]["eval_ce"] - summary["after"]["eval_ce"])


def types_in(file: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(file).values()}


@pytest.mark.parametrize("adapters", [{}, ADAPTERS], ids=["full", "adapters"])
def test_bf16_goes_the_way_of_float32(
    distil: Callable[..., Path], tmp_path: Path, adapters: dict[str, Any]
) -> None:
    given = SMALL | adapters
    whole = way(distil(tmp_path / "whole", **given))
    mixed = way(distil(tmp_path / "mixed", **given, training__precision="bf16"))
    assert whole > 0.01
    assert mixed == pytest.approx(whole, rel=0.05)


def test_16_bit_weights_lose_most_of_the_way_and_the_run_says_so(
    distil: Callable[..., Path], tmp_path: Path
) -> None:
    said: list[str] = []
    whole = way(distil(tmp_path / "whole", **SMALL))
    half = way(distil(tmp_path / "half", said, **SMALL, model__student_dtype="bfloat16"))
    assert half < 0.6 * whole
    assert any("model.student_dtype=bfloat16 trains 16-bit weights" in line for line in said)


def test_checkpoints_hold_float32_and_the_student_is_saved_in_bf16(
    distil: Callable[..., Path], tmp_path: Path
) -> None:
    folder = distil(tmp_path / "run", training__precision="bf16")
    kept = load_file(folder / "checkpoints" / "checkpoint-2" / "model.safetensors")
    saved = load_file(folder / "student" / "model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    for name, tensor in saved.items():
        assert torch.equal(tensor, kept[name].to(torch.bfloat16)), name
    config = json.loads((folder / "student" / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "bfloat16"
    state = torch.load(folder / "checkpoints" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    moments = {x["exp_avg"].dtype for x in state["state"].values()}
    assert moments == {torch.float32}
    kept_config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert kept_config["model"]["teacher_dtype"] == "bfloat16"
    assert kept_config["output"]["dtype"] == "bfloat16"


def test_adapters_are_float32_over_a_16_bit_base_and_merge_into_the_type_of_the_student(
    distil: Callable[..., Path], tiny_pair: Any, tmp_path: Path
) -> None:
    given = {**ADAPTERS, "lora__merge": True, "training__precision": "bf16"}
    folder = distil(tmp_path / "run", **given)
    assert types_in(folder / "adapter" / "adapter_model.safetensors") == {torch.float32}
    merged = load_file(folder / "student" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    wide = distil(tmp_path / "wide", **given, output__dtype="float32")
    exact = load_file(wide / "student" / "model.safetensors")
    # Merged in float32 it is the base plus the product, which 16 bits cannot hold.
    base = load_file(tiny_pair.student / "model.safetensors")
    parts = load_file(wide / "adapter" / "adapter_model.safetensors")
    prefix = "model.layers.0.self_attn.q_proj"
    down, up = (parts[f"base_model.model.{prefix}.lora_{x}.weight"] for x in "AB")
    expected = base[f"{prefix}.weight"].bfloat16().float() + 16.0 / 4 * (up @ down)
    torch.testing.assert_close(exact[f"{prefix}.weight"], expected, rtol=0, atol=1e-6)
    assert torch.equal(merged[f"{prefix}.weight"], exact[f"{prefix}.weight"].bfloat16())


@pytest.mark.parametrize(
    "more", [{}, {"lora__rank": 2}, {"procedure__spec": "gkd:lambda=1"}], ids=str
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    distil: Callable[..., Path], tmp_path: Path, more: dict[str, Any]
) -> None:
    given = {"training__precision": "bf16", "training__save_steps": 2, **more}
    whole = distil(tmp_path / "whole", training__max_steps=4, **given)
    cut = cut_back(whole, tmp_path / "cut")
    distil(cut, resume=True, training__max_steps=4, **given)
    names = [path.name for path in (whole / "student").glob("*.safetensors")]
    assert names
    for name in names:
        assert (whole / "student" / name).read_bytes() == (cut / "student" / name).read_bytes()
    assert summary_of(cut)["after"] == summary_of(whole)["after"]


def test_a_run_keeps_the_precision_that_it_began_with(
    distil: Callable[..., Path], tmp_path: Path
) -> None:
    folder = distil(tmp_path / "run", training__precision="bf16")
    distil(folder, resume=True, training__max_steps=3)  # null takes what was chosen
    kept = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert kept["training"]["precision"] == "bf16"
    with pytest.raises(InputError, match=r"training.precision was 'bf16' when the run began"):
        distil(folder, resume=True, training__max_steps=4, training__precision="float32")


def test_a_run_in_float32_may_follow_one_in_bf16_in_the_same_process(
    distil: Callable[..., Path], tmp_path: Path
) -> None:
    first = distil(tmp_path / "first")
    distil(tmp_path / "between", training__precision="bf16")
    second = distil(tmp_path / "second")
    files = [folder / "student" / "model.safetensors" for folder in (first, second)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_measures_before_training_are_those_of_the_precision(
    distil: Callable[..., Path], tmp_path: Path
) -> None:
    """At a learning rate of next to nothing, before and after are one student."""
    folder = distil(tmp_path / "run", optimizer__lr=1e-12, training__precision="bf16")
    found = summary_of(folder)
    assert found["before"]["eval_ce"] == pytest.approx(found["after"]["eval_ce"], rel=1e-7)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("float32", "float32", "float32", "float32")),
        ({"precision": "bf16"}, ("bf16", "float32", "bfloat16", "bfloat16")),
        (
            {"precision": "bf16", "teacher_dtype": "float32"},
            ("bf16", "float32", "float32", "bfloat16"),
        ),
        ({"precision": "bf16", "rank": 2}, ("bf16", "bfloat16", "bfloat16", "bfloat16")),
        ({"dtype": "bfloat16"}, ("float32", "bfloat16", "bfloat16", "bfloat16")),
        ({"precision": "bf16", "saved": "float32"}, ("bf16", "float32", "bfloat16", "float32")),
    ],
)
def test_what_follows_from_the_precision(given: dict[str, Any], expected: tuple[str, ...]) -> None:
    keys = {
        "precision": "training.precision",
        "teacher_dtype": "model.teacher_dtype",
        "dtype": "model.dtype",
        "rank": "lora.rank",
        "saved": "output.dtype",
    }
    config = settle_precision(load_config(None, [(keys[k], v) for k, v in given.items()]), "cpu")
    assert (
        config.training.precision,
        config.model.student_dtype,
        config.model.teacher_dtype,
        config.output.dtype,
    ) == expected


def test_an_accelerator_trains_in_bf16_unless_told_otherwise() -> None:
    assert settle_precision(load_config(), "cuda").training.precision == "bf16"
    assert settle_precision(load_config(), "mps").training.precision == "float32"


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["training.precision=fp16"], "training.precision=fp16 needs an accelerator"),
        (
            ["training.precision=fp16", "training.fsdp=true"],
            "training.precision=fp16 is not supported with training.fsdp=true",
        ),
        (
            ["training.precision=fp16", "model.student_dtype=float16"],
            "training.precision=fp16 scales the gradients of float32 weights",
        ),
        (["training.precision=bf8"], "training.precision='bf8'"),
    ],
)
def test_wrong_precision_is_one_line(settings: list[str], line: str, tmp_path: Path) -> None:
    arguments = [word for one in settings for word in ("--set", one)]
    done = CliRunner().invoke(cli, [*arguments, "--output", str(tmp_path / "run")])
    error = done.exception
    assert isinstance(error, InputError)
    assert line in str(error)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_go_the_same_way(
    distil: Callable[..., Path], tiny_pair: Any, tmp_path: Path, fsdp: bool
) -> None:
    whole = distil(tmp_path / "one", **SMALL)
    arguments = [
        *("--teacher", tiny_pair.teacher, "--student", tiny_pair.student),
        *("--data", tiny_pair.rows, "--max-length", 128, "--max-steps", STEPS),
        *("--batch-size", 4, "--lr", 2e-4, "--set", "optimizer.scheduler=constant"),
        *("--set", "training.precision=bf16", "--set", "loss.compiled=false"),
        *("--set", f"training.fsdp={fsdp}".lower(), "--output", tmp_path / "two"),
    ]
    for done in kdrun_in_processes(2, *arguments):
        assert done.returncode == 0, done.stderr[-3000:]
    assert way(tmp_path / "two") == pytest.approx(way(whole), rel=0.05)
    saved = load_file(tmp_path / "two" / "student" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "two" / "student" / "config.json").read_text("utf-8"))
    assert config["dtype"] == "bfloat16"
