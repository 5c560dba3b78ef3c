"""``torchrun -m kdrun`` on the built-in pair: two processes are one run.

One test starts them by torchrun itself; the others as it does, without waiting for imports.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from commands import kdrun_in_processes
from safetensors.torch import load_file

from kdrun.cli import cli
from kdrun.errors import InputError

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RUN = [
    *("--loss", "reverse_kl_chunked", "--max-steps", "6"),
    *("--set", "training.save_steps=4", "--set", "training.logging_steps=1"),
    *("--set", "loss.compiled=false", "--set", "loss.chunk_size=64"),
    *("--set", "training.gradient_parts=true"),
]


def launch(*arguments: object, processes: int = 2) -> None:
    for done in kdrun_in_processes(processes, *RUN, *arguments):
        assert done.returncode == 0, done.stderr[-3000:]


def alone(*arguments: object) -> None:
    done = CliRunner().invoke(cli, [*RUN, *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    alone("--batch-size", 8, "--output", folder)
    return folder


def check_equal(one: Path, other: Path) -> None:
    expected, found = (
        json.loads((folder / "summary.json").read_text(encoding="utf-8")) for folder in (one, other)
    )
    for when in ("before", "after"):
        assert found[when] == pytest.approx(expected[when], rel=1e-5), when
    weights, others = (
        load_file(folder / "student" / "model.safetensors") for folder in (one, other)
    )
    assert set(weights) == set(others)
    for name, weight in weights.items():
        assert (others[name] - weight).abs().max() <= 1e-5, name
    steps = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        for folder in (one, other)
    ]
    assert [line["step"] for line in steps[0]] == [line["step"] for line in steps[1]]
    for line, same in zip(*steps, strict=True):
        if "kd_loss" in line:
            for name in ("kd_loss", "class_grad_norm", "kd_grad_norm", "grad_cosine"):
                assert same[name] == pytest.approx(line[name], rel=1e-5), name


def test_two_processes_are_one_run_which_one_may_finish(
    one: Path, torchrun: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "two"
    done = torchrun(2, "-m", "kdrun", *RUN, "--batch-size", 4, "--output", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    check_equal(one, folder)
    assert done.stderr.count("step 6/6") == 1  # one of them speaks
    assert {path.name for path in (folder / "checkpoints" / "checkpoint-4").iterdir()} >= {
        "rng_state_0.pth",
        "rng_state_1.pth",
        "complete",
    }
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    (folder / "summary.json").unlink()
    alone("--batch-size", 8, "--output", folder, "--resume")
    check_equal(one, folder)


def test_models_spread_over_two_processes_are_one_run(one: Path, tmp_path: Path) -> None:
    folder = tmp_path / "spread"
    spread = ("--set", "training.fsdp=true", "--output", folder)
    launch("--batch-size", 4, *spread)
    check_equal(one, folder)
    # A resumed run keeps its configuration, which one process cannot serve.
    with pytest.raises(InputError, match=r"training\.fsdp=true shards the models"):
        alone("--batch-size", 8, "--output", folder, "--resume")
    with pytest.raises(InputError, match=r"written with training\.fsdp=true"):
        alone("--batch-size", 8, "--output", folder, "--resume", "--set", "training.fsdp=false")
    # As many processes go on bit for bit, and others with the same values.
    weights = (folder / "student" / "model.safetensors").read_bytes()
    for processes in (2, 4):
        shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
        (folder / "summary.json").unlink()
        launch("--batch-size", 8 // processes, *spread, "--resume", processes=processes)
        check_equal(one, folder)
        if processes == 2:
            assert (folder / "student" / "model.safetensors").read_bytes() == weights


def test_spread_adapters_and_the_state_of_a_loss_are_resumed_bit_for_bit(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments: list[object] = ["--loss", "taid_chunked", "--batch-size", 4, "--lora-rank", 4]
    arguments += ["--set", "lora.dropout=0.1", "--set", "training.fsdp=true"]
    arguments += ["--set", "training.eval_steps=4", "--output", folder]
    launch(*arguments)
    weights = (folder / "student" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    shutil.rmtree(folder / "student")
    (folder / "summary.json").unlink()
    launch(*arguments, "--resume")
    assert (folder / "student" / "adapter_model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("environment", "arguments", "said"),
    [
        ({}, ["--set", "training.fsdp=true"], "torchrun --nproc-per-node"),
        ({"ACCELERATE_USE_FSDP": "true"}, [], "silently runs DDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, [], "DeepSpeed"),
    ],
)
def test_what_cannot_be_spread_is_refused_first(
    environment: dict[str, str],
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=said):
        alone(*arguments, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()
