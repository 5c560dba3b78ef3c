"""The printed default configuration, and the files that come with the project."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from kdrun.cli import cli
from kdrun.config import RunConfig, load_config
from kdrun.distillation import check_name

RECIPES = sorted((Path(__file__).parents[2] / "docs" / "recipes").glob("*.yaml"))


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
    assert config.data.packing
    assert (config.model.teacher is None) == (config.loss.kd_ratio == 0)
    head = file.read_text(encoding="utf-8").split("\nmodel:")[0]
    assert f"kdrun --config docs/recipes/{file.name} --dry-run" in head
    assert f"({file.name})" in (file.parent / "README.md").read_text(encoding="utf-8")


def test_the_teacher_of_a_recipe_is_what_the_one_before_makes() -> None:
    first, second = (load_config(file) for file in RECIPES if file.stem.startswith("qwen2"))
    assert first.lora.merge
    assert second.model.teacher == f"{first.output.dir}/student"
    assert first.data.train == second.data.train
