"""Rows that are longer than a model's context are refused before anything is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from kdrun.errors import InputError
from kdrun.models.context import context_limit


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_the_model_and_its_limit_are_named(
    which: str, tiny_pair: Any, tmp_path: Path, distil: Any
) -> None:
    folder = tmp_path / which
    shutil.copytree(getattr(tiny_pair, which), folder)
    (folder / "model.safetensors").unlink()  # reading it would fail with another message
    config = transformers.AutoConfig.from_pretrained(folder)
    config.max_position_embeddings = 100
    config.save_pretrained(folder)
    with pytest.raises(InputError) as info:
        distil(tmp_path / "run", **{f"model__{which}": str(folder)})
    assert str(info.value) == (
        f"data.max_length=128: the context of {folder} holds 100 tokens; give --max-length 100 or "
        "less"
    )


def test_limits() -> None:
    assert context_limit(transformers.GPT2Config(n_positions=77)) == 77
    stretched = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}
    stretched["rope_theta"] = 10000.0
    config = transformers.Qwen2Config(max_position_embeddings=1000, rope_parameters=stretched)
    assert context_limit(config) == 4000
    config = transformers.LlamaConfig(max_position_embeddings=131072)
    assert context_limit(config) == 131072
    assert context_limit(transformers.MambaConfig()) is None
