"""The dry run's figures against measured steps; what it checks, and that it reads no weights."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pair_configs
import pytest
import torch
import transformers
from click.testing import CliRunner

from kdlosses.engine.plan import keep_freed_tiles
from kdrun import DistillTrainer
from kdrun.cache.command import cache_teacher
from kdrun.cli import cli
from kdrun.config.load import load_config
from kdrun.config.sections import KD_RATIO, RunConfig
from kdrun.data.collate import Collator
from kdrun.data.encoder import Encoder
from kdrun.data.prepare import encode_rows, read_rows
from kdrun.dry_run.devices import find_device
from kdrun.dry_run.models import Shadow
from kdrun.dry_run.report import dry_run
from kdrun.errors import InputError
from kdrun.losses.build import build_loss
from kdrun.models.adapters import add_adapters
from kdrun.models.context import load_model_config
from kdrun.models.pairs import find_pair, load_student, load_teacher
from kdrun.procedures import Session
from kdrun.run.arguments import training_arguments
from kdrun.run.distill import distill

config_of = partial(pair_configs.config_of, training__batch_size=4)


def growth(profile: Any) -> tuple[int, int]:
    """The most and the last bytes above the start, from the allocator's own records."""
    now, peak = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak, now


def profiled() -> Any:
    return torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    )


class Measured:
    """An objective that records what its first evaluation takes."""

    def __init__(self, objective: Any) -> None:
        self._objective = objective
        self.peak = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def __call__(self, *arguments: Any) -> Any:
        if self.peak:
            return self._objective(*arguments)
        with profiled() as profile:
            found = self._objective(*arguments)
        self.peak = growth(profile)[0]
        return found


def one_step(config: RunConfig, folder: Path) -> tuple[DistillTrainer, int]:
    """A real step of a run, and the most memory that its loss took."""
    pair = find_pair(config.model)
    examples = encode_rows(
        read_rows(config.data), Encoder.of(config.data, pair.tokenizer, {}), shift_windows=False
    )
    student: Any = load_student(pair, config.model, 0)
    if config.lora.rank is not None:
        student = add_adapters(student, config.lora, pair.student.path, 0)
    trainer = DistillTrainer(
        model=student,
        teacher=load_teacher(pair, config.model),
        loss=build_loss(config.loss, pair.vocab_size),
        kd_ratio=config.loss.schedules.get(KD_RATIO, config.loss.kd_ratio),
        args=training_arguments(config.optimizer, config.training, folder),
        data_collator=Collator(0),
        train_dataset=examples.train,
    )
    measured = Measured(trainer.objective)
    trainer.objective = measured  # type: ignore[assignment]
    trainer.train()
    return trainer, measured.peak


@pytest.mark.parametrize(
    "given",
    [
        {"loss__spec": "forward_kl_chunked", "loss__chunk_size": 256},
        {"loss__spec": "generalized_jsd"},
        {"loss__spec": "reverse_kl_chunked", "loss__kd_ratio": 0, "loss__chunk_size": 64},
        {
            "loss__spec": "adaptive_kl_chunked",
            "loss__chunk_size": 256,
            "lora__rank": 2,
            "lora__dora": True,
        },
    ],
    ids=["chunked", "plain", "cross-entropy", "lora"],
)
def test_loss_and_optimiser_are_those_of_a_measured_step(
    given: dict[str, Any], tmp_path: Path
) -> None:
    overrides = {"training.max_steps": 1, "loss.compiled": False, "training.batch_size": 4}
    overrides |= {key.replace("__", "."): value for key, value in given.items()}
    if not given["loss__spec"].endswith("_chunked"):
        del overrides["loss.compiled"]
    config = load_config(None, list(overrides.items()))
    keep_freed_tiles.cache_clear()  # as in a new process
    found = dry_run(config, "cpu")
    trainer, peak = one_step(config, tmp_path)
    assert found.memory["loss"] == pytest.approx(peak, rel=0.15)
    state = [x for s in trainer.optimizer.state.values() for x in s.values() if torch.is_tensor(x)]
    assert found.memory["optimiser"] == sum(x.nbytes for x in state if x.ndim)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert found.memory["gradients"] == sum(p.nbytes for p in trained)
    assert found.student.trained == sum(p.numel() for p in trained)
    assert found.memory["weights of the student"] == sum(
        p.nbytes for p in trainer.model.parameters()
    )
    assert trainer.teacher is not None
    assert found.teacher is not None
    assert found.teacher.parameters == sum(p.numel() for p in trainer.teacher.model.parameters())


def test_activations_are_those_of_a_real_forward_pass() -> None:
    config = load_config()
    pair = find_pair(config.model)
    shadow = Shadow(pair.student, load_model_config(pair.student), "float32", False, pair)
    student = load_student(pair, config.model, 0).train()
    ids = torch.zeros(4, 96, dtype=torch.long)
    with profiled() as profile:
        hidden = student.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    estimated = shadow.activations(4, 96, False)
    assert estimated == pytest.approx(growth(profile)[1], rel=0.2)
    assert shadow.activations(8, 96, False) == pytest.approx(2 * estimated, rel=0.05)
    assert shadow.activations(4, 96, True) < 0.7 * estimated
    del hidden
    with profiled() as profile, torch.autocast("cpu", torch.bfloat16):
        hidden = student.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    mixed = shadow.activations(4, 96, False, torch.bfloat16)
    copies = shadow.copies(torch.bfloat16, head=False)
    assert copies == 2 * sum(
        x.weight.numel() for x in student.base_model.modules() if isinstance(x, torch.nn.Linear)
    )
    assert mixed + copies == pytest.approx(growth(profile)[1], rel=0.2)


def test_steps_and_rows_are_those_of_the_run(tiny_pair: Any, distil: Any, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "training__num_epochs": 2,
        "training__gradient_accumulation_steps": 3,
        "training__max_steps": None,
    }
    found = dry_run(config_of(tiny_pair, **given))
    run = distil(tmp_path / "run", **given)
    assert json.loads((run / "summary.json").read_text())["steps"] == found.steps
    assert found.rows_per_step == 12
    assert found.longest <= 128


@pytest.mark.parametrize(
    ("procedure", "ratio", "rows"),
    [
        ("gkd:lambda=1", 0.5, 4),
        ("distillm2", 1, 8),
        ("minillm", 0.5, 8),
        ("minillm", 1, 4),
    ],
)
def test_rows_that_a_procedure_writes_are_counted(
    tiny_pair: Any, tmp_path: Path, procedure: str, ratio: float, rows: int
) -> None:
    given = {"procedure__max_new_tokens": 100, "loss__kd_ratio": ratio, "loss__compiled": False}
    config = config_of(tiny_pair, procedure__spec=procedure, **given)
    plain, found = dry_run(config_of(tiny_pair, loss__kd_ratio=ratio)), dry_run(config)
    assert found.rows_per_step == rows
    assert plain.longest < found.longest <= 128
    shares = [x.memory["activations"] or 0 for x in (found, plain)]
    assert shares[0] / shares[1] > 0.9 * (rows / 4) * (found.longest / plain.longest)
    # What a run's own step makes of its rows.
    widths = []
    ordinary = Session.micro_batches

    def watched(self: Session, given: Any) -> Any:
        made = ordinary(self, given)
        widths.extend(len(batch["input_ids"]) for batch in made)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "micro_batches", watched)
        overrides = {"training": {"max_steps": 1}, "output": {"dir": str(tmp_path / "run")}}
        values = config.model_dump()
        distill({**values, **{key: {**values[key], **new} for key, new in overrides.items()}})
    assert widths == [rows]


def test_the_plain_text_of_a_procedure_is_checked(tiny_pair: Any, tmp_path: Path) -> None:
    given = {"procedure__spec": "minillm", "procedure__text": str(tmp_path / "none.txt")}
    with pytest.raises(InputError, match=r"none\.txt: no such file"):
        dry_run(config_of(tiny_pair, **given))


def test_no_weights_are_read_and_nothing_is_written(
    tiny_pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("teacher", "student"):
        shutil.copytree(getattr(tiny_pair, name), name)
        Path(name, "model.safetensors").unlink()
    before = sorted(tmp_path.rglob("*"))
    arguments = ["--teacher", "teacher", "--student", "student", "--data", str(tiny_pair.rows)]
    arguments += ["--max-length", "128", "--dry-run", "--device", "h100"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert any(line.startswith("trained: 0.01 M parameters") for line in lines)
    assert "steps: 5 of 8 rows" in done.stdout
    assert "of 79.00 GiB" in done.stdout
    for part in ("weights of the student", "gradients", "optimiser", "activations", "loss"):
        assert any(line.split(" " * 3)[0].strip() == part for line in lines), part
    assert sorted(tmp_path.rglob("*")) == before


def test_a_cache_is_checked_against_the_rows(tiny_pair: Any, tmp_path: Path) -> None:
    config = config_of(tiny_pair)
    cache_teacher(
        config.model, config.served, config.data, 1.0, 0, 8, tmp_path / "cache", "hidden", 50
    )
    cached = {"model__teacher": None, "model__teacher_cache": str(tmp_path / "cache")}
    found = dry_run(config_of(tiny_pair, **cached))
    assert any(note.startswith("teacher: ") and "hidden states" in note for note in found.notes)
    assert found.teacher is None
    head = tmp_path / "cache" / "head.safetensors"
    assert found.memory["weights of the teacher"] == head.stat().st_size
    with pytest.raises(InputError, match="lacks the row"):
        dry_run(config_of(tiny_pair, data__max_length=24, **cached))


def test_what_does_not_fit_is_said(tiny_pair: Any) -> None:
    arguments = ["--teacher", str(tiny_pair.teacher), "--student", str(tiny_pair.student)]
    arguments += ["--data", str(tiny_pair.rows), "--max-length", "128", "--dry-run"]
    done = CliRunner().invoke(cli, [*arguments, "--device", "0.001GiB"])
    assert "this does not fit" in done.stdout


def test_devices() -> None:
    assert find_device("h100").kind == "cuda"
    assert find_device("24 GiB").memory == 24 * 2**30
    assert find_device("cpu").kind == "cpu"
    with pytest.raises(InputError, match="did you mean h100"):
        find_device("h10")
    with pytest.raises(InputError, match="known: t4"):
        find_device("xyz")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="this machine has none"):
            find_device("cuda")


def test_a_named_device_needs_a_dry_run() -> None:
    done = CliRunner().invoke(cli, ["--device", "h100"])
    assert done.exit_code == 2
    assert "--device requires --dry-run" in done.output


def test_a_large_pair_takes_no_memory_and_little_time(tiny_pair: Any, tmp_path: Path) -> None:
    """Shapes alone: a student of 8 billion parameters is sized here."""
    folder = tmp_path / "large"
    shutil.copytree(tiny_pair.student, folder)
    (folder / "model.safetensors").unlink()
    transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    found = dry_run(
        config_of(tiny_pair, model__student=str(folder), model__dtype="bfloat16"), "h100"
    )
    assert found.student.parameters == 8030261248  # as Meta states it of Llama 3.1 8B
    assert found.memory["optimiser"] == 2 * 2 * found.student.parameters


def test_several_processes_share_rows_and_spread_weights(
    tiny_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"loss__spec": "forward_kl_chunked", "loss__chunk_size": 64}
    alone = dry_run(config_of(tiny_pair, **given))
    ddp = dry_run(config_of(tiny_pair, **given), processes=4)
    fsdp = dry_run(config_of(tiny_pair, training__fsdp=True, **given), processes=4)
    assert (alone.rows_per_step, ddp.rows_per_step, fsdp.rows_per_step) == (4, 16, 16)
    assert alone.steps == 10  # 38 or more of the 40 rows are trained on
    assert ddp.steps == 3
    for part in ("activations", "loss"):
        assert alone.memory[part] == ddp.memory[part] == fsdp.memory[part]
    for part in ("weights of the student", "weights of the teacher", "optimiser"):
        whole = alone.memory[part]
        assert whole is not None
        assert ddp.memory[part] == whole
        assert fsdp.memory[part] == math.ceil(whole / 4)
    assert alone.memory["gradients"] is not None
    assert ddp.memory["gradients"] == 2 * alone.memory["gradients"]
    # Whole are the embeddings and norms of both models, and two blocks of the larger one.
    expected = 0
    blocks = []
    for folder in (tiny_pair.teacher, tiny_pair.student):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        expected += 4 * (model.model.embed_tokens.weight.numel() + model.model.norm.weight.numel())
        blocks.append(4 * sum(p.numel() for p in model.model.layers[0].parameters()))
    assert fsdp.memory["gathered weights"] == expected + 2 * max(blocks)
    monkeypatch.setenv("WORLD_SIZE", "4")
    launched = dry_run(config_of(tiny_pair, training__fsdp=True, **given))
    assert launched.memory == fsdp.memory


def test_spread_models_need_a_number_of_processes(tiny_pair: Any) -> None:
    with pytest.raises(InputError, match="--processes N"):
        dry_run(config_of(tiny_pair, training__fsdp=True))
    done = CliRunner().invoke(cli, ["--processes", "2"])
    assert done.exit_code == 2
    assert "--processes requires --dry-run" in done.output
