"""Section ``trainer``, optimisers by name, and the upload of the student."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from kdrun.cli import cli
from kdrun.config import trainer_keys
from kdrun.config.load import every_key, load_config
from kdrun.config.show import default_yaml
from kdrun.dry_run.report import dry_run
from kdrun.errors import InputError, TrainingError
from kdrun.run.arguments import training_arguments


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def refusal(*arguments: object) -> str:
    done = CliRunner().invoke(cli, [str(word) for word in arguments])
    assert isinstance(done.exception, InputError), done.output
    line = str(done.exception)
    assert "\n" not in line
    return line


def test_a_key_reaches_the_trainer_in_its_type(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("trainer:\n  neftune_noise_alpha: 5\n  run_name: 007\n".replace("007", "'007'"))
    config = load_config(file, [("trainer.dataloader_num_workers", 3)])
    found = training_arguments(
        config.optimizer, config.training, tmp_path / "out", config.trainer.arguments
    )
    assert found.neftune_noise_alpha == 5
    assert found.run_name == "007"
    assert found.dataloader_num_workers == 3
    again = yaml.safe_load(config.to_yaml())["trainer"]
    assert again == config.trainer.arguments


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("dataloader_num_worker=4", "did you mean dataloader_num_workers?"),
        ("learning_rate=1", "trainer.learning_rate is set by optimizer.lr"),
        ("lerning_rate=1", "did you mean learning_rate; in kdrun it is optimizer.lr?"),
        ("label_smoothing_factor=0.1", "trainer.label_smoothing_factor has no effect"),
        ("group_by_length=true", "it is trainer.train_sampling_strategy=group_by_length"),
        ("dataloader_num_workers=four", "trainer.dataloader_num_workers='four': expected int"),
        ("hub_token=hf_secret", "set HF_TOKEN in the environment"),
        ("ddp_backend=abc", "transformers refuses"),
    ],
)
def test_wrong_keys_are_one_line(setting: str, line: str, tmp_path: Path) -> None:
    said = refusal("--set", f"trainer.{setting}", "--output", tmp_path / "run")
    assert line in said
    assert "hf_secret" not in said


def test_every_owned_key_is_one_of_kdruns_and_every_name_is_of_this_version() -> None:
    fields = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    keys = {*every_key(), "--resume"}
    assert set(trainer_keys._OWNED.values()) <= keys
    assert set(trainer_keys._OWNED) | set(trainer_keys._REFUSED) <= fields
    passed_by_kdrun = {
        name
        for name, field in transformers.TrainingArguments.__dataclass_fields__.items()
        if name in training_arguments_given()
    }
    free = {"dataloader_pin_memory", "hub_strategy"}
    assert passed_by_kdrun - free <= set(trainer_keys._OWNED) | set(trainer_keys._REFUSED)


def training_arguments_given() -> set[str]:
    """The arguments that kdrun sets itself."""
    given: set[str] = set()

    class Spy:
        def __init__(self, **arguments: Any) -> None:
            given.update(arguments)

    config = load_config()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers, "TrainingArguments", Spy)
        training_arguments(config.optimizer, config.training, Path("unused"))
    return given


def test_what_kdrun_config_prints_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    file.write_text(default_yaml(), encoding="utf-8")
    assert load_config(file) == load_config()


def test_batches_by_length_leave_less_padding_and_workers_change_nothing(
    distil: Callable[..., Path], tmp_path: Path
) -> None:
    plain = distil(tmp_path / "plain")
    workers = distil(tmp_path / "workers", trainer__dataloader_num_workers=2)
    grouped = distil(tmp_path / "grouped", trainer__train_sampling_strategy="group_by_length")
    for name, weight in weights_of(plain).items():
        assert torch.equal(weight, weights_of(workers)[name]), name
    assert any(
        not torch.equal(weight, weights_of(grouped)[name])
        for name, weight in weights_of(plain).items()
    )
    changed = {"trainer__train_sampling_strategy": "group_by_length"}
    with pytest.raises(InputError, match=r"trainer.train_sampling_strategy"):
        distil(grouped, resume=True, training__max_steps=3)
    distil(grouped, resume=True, training__max_steps=3, **changed)


def test_noise_on_embeddings_changes_training_and_is_not_saved(
    distil: Callable[..., Path], tmp_path: Path
) -> None:
    plain = weights_of(distil(tmp_path / "plain"))
    noisy = weights_of(distil(tmp_path / "noisy", trainer__neftune_noise_alpha=5.0))
    assert set(plain) == set(noisy)
    assert any(not torch.equal(plain[name], noisy[name]) for name in plain)


@pytest.mark.parametrize("name", ["adafactor", "sgd", "adamw_torch", "adamw_torch_fused"])
def test_the_dry_run_counts_what_an_optimiser_keeps(
    distil: Callable[..., Path], tiny_pair: Any, tmp_path: Path, name: str
) -> None:
    folder = distil(tmp_path / "run", optimizer__name=name)
    state = torch.load(folder / "checkpoints" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    kept = sum(
        value.nbytes
        for of_one in state["state"].values()
        for value in of_one.values()
        if torch.is_tensor(value) and value.ndim
    )
    config = load_config(folder / "config.yaml")
    planned = dry_run(config, "cpu")
    trained = planned.student.trained_weights
    assert planned.memory["optimiser"] == pytest.approx(kept, abs=0.2 * trained)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["optimizer.name=adafacto"], "did you mean adafactor?"),
        (["optimizer.name=galore_adamw"], "needs a package: pip install galore-torch"),
        (["optimizer.name=schedule_free_adamw"], "pip install schedulefree"),
        (
            ["optimizer.name=adafactor", "optimizer.betas=[0.8, 0.9]"],
            "optimizer.betas has no effect with optimizer.name=adafactor",
        ),
    ],
)
def test_optimisers_that_cannot_be_used(settings: list[str], line: str, tmp_path: Path) -> None:
    words = [word for one in settings for word in ("--set", one)]
    assert line in refusal(*words, "--output", tmp_path / "run")


def test_another_optimiser_cannot_continue_a_run(
    distil: Callable[..., Path], tmp_path: Path
) -> None:
    folder = distil(tmp_path / "run")
    with pytest.raises(InputError, match=r"optimizer.name was None"):
        distil(folder, resume=True, training__max_steps=3, optimizer__name="sgd")


class Hub:
    """What is asked of the hub, which does not exist here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: str = "") -> None:
        import huggingface_hub

        self.uploaded: list[dict[str, Any]] = []

        def create(hub: Any, name: str, **options: Any) -> Any:
            if fails == "create":
                raise OSError("401 Client Error")
            return type("Url", (), {"repo_id": f"me/{name}"})

        def upload(hub: Any, **options: Any) -> None:
            if fails == "upload":
                raise OSError("503 Server Error")
            self.uploaded.append(options)

        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)


PUSHED = {"trainer__push_to_hub": True, "trainer__hub_model_id": "small"}


def test_the_finished_student_is_uploaded(
    distil: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub, said = Hub(monkeypatch), list[str]()
    folder = distil(tmp_path / "run", said, **PUSHED)
    (sent,) = hub.uploaded
    assert sent["repo_id"] == "me/small"
    assert sent["folder_path"] == folder / "student"
    assert said[-1] == "uploaded to me/small"


def test_a_hub_that_refuses_is_told_before_the_first_step(
    distil: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Hub(monkeypatch, fails="create")
    with pytest.raises(InputError, match=r"cannot be created \(401 Client Error\)"):
        distil(tmp_path / "run", **PUSHED)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_upload_that_fails_loses_nothing(
    distil: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Hub(monkeypatch, fails="upload")
    with pytest.raises(TrainingError, match="upload it with 'hf upload me/small"):
        distil(tmp_path / "run", **PUSHED)
    assert json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))["steps"] == 2
    assert weights_of(tmp_path / "run")
