"""The printed default configuration, and the files that come with the project."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from kdrun.cli import cli
from kdrun.config import RunConfig, load_config


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
    words = " ".join(printed.replace("#", " ").split())
    for section in RunConfig.model_fields:
        for key, field in type(getattr(load_config(), section)).model_fields.items():
            assert field.description, f"{section}.{key}"
            assert " ".join(field.description.split()) in words
    assert max(map(len, printed.splitlines())) <= 100
    assert "one of float32, bfloat16, float16" in words
    assert "0.0001 for other pairs" in words
