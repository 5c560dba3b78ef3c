"""Failures that people met with other tools, as whole runs; the parts have tests of their own.

The letters and numbers are those under which the failures were collected.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

from kdrun.cli import cli
from kdrun.errors import InputError

Distil = Callable[..., Path]


def widen(folder: Path, width: int, place: Path) -> Path:
    """The same model with a head and embeddings of more entries, which no token has."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    size = model.config.vocab_size
    model.resize_token_embeddings(width, mean_resizing=False)
    with torch.no_grad():  # so large that they would take much of the probability
        model.get_output_embeddings().weight[size:] = 3.0
    model.save_pretrained(place)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(place)
    return place


def measures(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return found


def test_d1_heads_padded_to_two_sizes_train_as_heads_of_the_tokenizers_size(
    distil: Distil, tiny_pair: Any, tmp_path: Path
) -> None:
    said: list[str] = []
    padded = distil(
        tmp_path / "padded",
        said,
        model__teacher=str(widen(tiny_pair.teacher, 384, tmp_path / "teacher")),
        model__student=str(widen(tiny_pair.student, 320, tmp_path / "student")),
    )
    plain = distil(tmp_path / "plain")
    for when in ("before", "after"):
        assert measures(padded)[when] == pytest.approx(measures(plain)[when], rel=1e-4)
    (line,) = (line for line in said if "heads are cut to the tokenizer's" in line)
    assert "teacher 384" in line
    assert "student 320" in line


def test_d19_code_of_a_teacher_is_not_run_unasked(tiny_pair: Any, tmp_path: Path) -> None:
    teacher, marker = tmp_path / "teacher", tmp_path / "it-ran"
    shutil.copytree(tiny_pair.teacher, teacher)
    config = json.loads((teacher / "config.json").read_text(encoding="utf-8"))
    config["model_type"] = "foreign"
    config["auto_map"] = {
        "AutoConfig": "foreign.ForeignConfig",
        "AutoModelForCausalLM": "foreign.ForeignForCausalLM",
    }
    (teacher / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (teacher / "foreign.py").write_text(
        "from pathlib import Path\n"
        "import transformers\n"
        f"Path({str(marker)!r}).touch()\n"
        "class ForeignConfig(transformers.LlamaConfig):\n"
        "    model_type = 'foreign'\n"
        "class ForeignForCausalLM(transformers.LlamaForCausalLM):\n"
        "    config_class = ForeignConfig\n",
        encoding="utf-8",
    )
    arguments = ["--teacher", str(teacher), "--student", str(tiny_pair.student)]
    arguments += ["--data", str(tiny_pair.rows), "--max-length", "128", "--max-steps", "1"]
    arguments += ["--set", "loss.compiled=false", "--output", str(tmp_path / "run")]
    with pytest.raises(InputError, match=r"teacher.*model\.trust_remote_code=true"):
        CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert not marker.exists()
    assert not (tmp_path / "run" / "student").exists()
    arguments += ["--overwrite", "--set", "model.trust_remote_code=true"]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert marker.exists()
    assert measures(tmp_path / "run")["after"]["eval_forward_kl"] > 0


def test_d22_the_saved_folder_renders_a_message_as_before(
    distil: Distil, tiny_pair: Any, tmp_path: Path
) -> None:
    run = distil(tmp_path / "run")
    message = [{"role": "user", "content": "the user asks"}]
    before, after = (
        transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
            message, add_generation_prompt=True
        )["input_ids"]
        for folder in (tiny_pair.student, run / "student")
    )
    assert before == after
    assert len(before) > 5


def test_r13_checkpoints_hold_the_student_alone(distil: Distil, tmp_path: Path) -> None:
    from safetensors import safe_open

    run = distil(tmp_path / "run", training__save_steps=1)
    student = transformers.AutoModelForCausalLM.from_pretrained(run / "student")
    size = 4 * sum(parameter.numel() for parameter in student.parameters())
    for folder in (run / "student", run / "checkpoints" / "checkpoint-1"):
        with safe_open(folder / "model.safetensors", "pt") as file:
            names = set(file.keys())
        assert names == set(dict(student.named_parameters()))
        assert (folder / "model.safetensors").stat().st_size < 1.1 * size + 4096
