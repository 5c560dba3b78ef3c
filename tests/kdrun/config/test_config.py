"""The printed default configuration, and the files that come with the project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from kdrun.cli import cli
from kdrun.config.load import load_config, parse_value
from kdrun.config.sections import RunConfig
from kdrun.errors import InputError
from kdrun.losses.build import check_name

RECIPES = sorted((Path(__file__).parents[3] / "docs" / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def printed() -> str:
    done = CliRunner().invoke(cli, ["config"])
    assert done.exit_code == 0
    return done.stdout


def test_the_printed_configuration_is_the_default_and_complete(
    printed: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(printed, encoding="utf-8")
    assert load_config(file) == load_config()
    values = yaml.safe_load(printed)
    assert {name: list(section) for name, section in values.items()} == {
        name: list(getattr(load_config(), name).model_dump()) for name in RunConfig.model_fields
    }


def test_every_key_stands_under_its_description(printed: str) -> None:
    lines = [line.strip().removeprefix("# ") for line in printed.splitlines()]
    words = " ".join(" ".join(lines).split())
    for section in RunConfig.model_fields:
        for key, field in type(getattr(load_config(), section)).model_fields.items():
            assert field.description, f"{section}.{key}"
            assert " ".join(field.description.split()) in words
    assert max(map(len, printed.splitlines())) <= 100
    assert "one of float32, bfloat16, float16" in words
    assert "0.0001 for other pairs" in words


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_are_runs(file: Path) -> None:
    config = load_config(file)
    check_name(config.loss.spec)
    assert config.output.dir is not None
    assert config.output.dir.startswith("runs/")
    assert config.data.packing == (config.procedure.spec is None)
    assert (config.model.teacher is None) == (config.loss.kd_ratio == 0)
    head = file.read_text(encoding="utf-8").split("\nmodel:")[0]
    assert f"kdrun --config docs/recipes/{file.name} --dry-run" in head
    assert f"({file.name})" in (file.parent / "README.md").read_text(encoding="utf-8")


def test_the_teacher_of_a_recipe_is_what_the_one_before_makes() -> None:
    names = ("qwen2_1_5b_fine_tune", "qwen2_1_5b_to_0_5b")
    first, second = (load_config(file) for file in RECIPES if file.stem in names)
    assert first.lora.merge
    assert second.model.teacher == f"{first.output.dir}/student"
    assert first.data.train == second.data.train


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("evaluation.answer_pattern", "#### *(.+)", "#### *(.+)"),
        ("evaluation.answer_pattern", "The answer is: (.+)", "The answer is: (.+)"),
        ("evaluation.answer_pattern", "[Aa]nswer: (.+)", "[Aa]nswer: (.+)"),
        ("evaluation.answer_pattern", "null", None),
        ("data.train", "1e3", "1e3"),
        ("data.eval", "", None),
        ("data.cache_dir", "none", "none"),
        ("model.teacher", "none", None),
        ("procedure.spec", "none", None),
        ("optimizer.lr", "1e-3", 0.001),
        ("data.max_length", "64", 64),
        ("loss.temperature_scaling", "false", False),
        ("optimizer.betas", "[0.9, 0.95]", [0.9, 0.95]),
        ("loss.chunk_size", "null", None),
        ("model.dtype", "bfloat16", "bfloat16"),
    ],
)
def test_text_is_taken_as_it_stands_and_all_else_is_yaml(
    key: str, text: str, expected: Any
) -> None:
    assert parse_value(key, text) == expected


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("loss.schedules", "{kd_ratio: {kind: linear, start: 0.2, end: 0.8}"),
        ("optimizer.betas", "[0.9, 0.95"),
        ("training.seed", "2020-13-45"),
    ],
)
def test_broken_yaml_is_told_in_one_line_with_its_key(key: str, text: str) -> None:
    with pytest.raises(InputError, match=rf"^{key}=.* not valid YAML .*$"):
        parse_value(key, text)


def test_a_key_that_is_no_word_is_told(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for content in ("on:\n  lr: 1\n", "training:\n  on: 1\n"):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(
            InputError, match=r"run\.yaml: .*reads a key here as True, not as a word"
        ):
            load_config(file)
    file.write_text("training:\n  seed: 2020-13-45\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"run\.yaml: not valid YAML"):
        load_config(file)


def test_epochs_that_are_asked_for_take_the_place_of_the_built_in_pairs_steps(
    tmp_path: Path,
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("training:\n  num_epochs: 2\n", encoding="utf-8")
    for config in (load_config(file), load_config(None, [("training.num_epochs", 2)])):
        assert (config.training.max_steps, config.training.num_epochs) == (None, 2)
        assert config.training.batch_size == load_config().training.batch_size
    both = load_config(file, [("training.max_steps", 5)])
    assert both.training.max_steps == 5
    assert load_config(None, [("training.seed", 1)]).training.max_steps is not None


def test_a_value_with_a_line_break_is_told_in_one_line() -> None:
    schedule = {"kd_ratio": {"kind": "l\ninear", "start": 0, "end": 1}}
    with pytest.raises(InputError, match=r"loss\.schedules") as told:
        load_config(None, [("loss.schedules", schedule)])
    assert "\n" not in str(told.value)


def test_yaml_may_write_the_key_on_without_quotes(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("token_weight: {spec: entropy, on: both}\n", encoding="utf-8")
    assert load_config(file).token_weight.on == "both"
    file.write_text("token_weight: {spec: entropy, on: ce}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"token_weight\.on"):
        load_config(file)
    file.write_text("loss: {on: both}\n", encoding="utf-8")
    with pytest.raises(InputError, match="YAML reads a key here as True"):
        load_config(file)
