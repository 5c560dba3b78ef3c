"""Rows that are longer than a model's context are refused before anything is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from kdrun.errors import InputError
from kdrun.models.context import check_length, context_limit
from kdrun.models.gguf_header import context_length
from kdrun.models.locate import locate_model


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
        f"data.max_length=128: the context of {folder} is limited to 100 tokens; pass "
        "--max-length 100 or "
        "less"
    )


@pytest.mark.real_model
def test_a_gguf_file_tells_its_context(smollm2_gguf: Path) -> None:
    assert context_length(smollm2_gguf) == 8192
    with pytest.raises(InputError, match="limited to 8192 tokens"):
        check_length(locate_model(smollm2_gguf), 8193)


def test_the_context_stands_anywhere_in_the_head_of_a_gguf_file(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5, 2.5])
    writer.add_bool("some.flag", True)
    writer.add_float64("some.number", 0.5)
    writer.add_context_length(777)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    content = (tmp_path / "a.gguf").read_bytes()
    assert context_length(tmp_path / "a.gguf") == 777
    for name, part in (("half", content[: len(content) // 2]), ("no", b"x" + content)):
        (tmp_path / name).write_bytes(part)
        assert context_length(tmp_path / name) is None


def test_limits() -> None:
    assert context_limit(transformers.GPT2Config(n_positions=77)) == 77
    stretched = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}
    stretched["rope_theta"] = 10000.0
    config = transformers.Qwen2Config(max_position_embeddings=1000, rope_parameters=stretched)
    assert context_limit(config) == 4000
    config = transformers.LlamaConfig(max_position_embeddings=131072)
    assert context_limit(config) == 131072
    assert context_limit(transformers.MambaConfig()) is None
