"""``kdrun evaluate`` on folders of tiny models, against logits in float64."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

from kdrun.cli import cli
from kdrun.errors import InputError

ROWS = [
    {"prompt": f"question {i}", "response": f"the answer to the user is {i * i}"} for i in range(7)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    base = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("teacher", "student", "other")):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.2,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(base / name)
        tiny_tokenizer.save_pretrained(base / name)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (base / "rows.jsonl").write_text(lines, encoding="utf-8")
    # A run's folder stands for its student.
    (base / "run").mkdir()
    (base / "other").rename(base / "run" / "student")
    return base


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["evaluate", *map(str, arguments)], catch_exceptions=False)


def oracle(base: Path, student: str, tokenizer: Any) -> dict[str, float]:
    """Each row alone, logits in float64, sums over the tokens after the prompt."""
    models = {}
    for name in (student, "teacher"):
        models[name] = transformers.LlamaForCausalLM.from_pretrained(base / name).double().eval()
    ce, forward, reverse, agree, tokens = 0.0, 0.0, 0.0, 0.0, 0
    for row in ROWS:
        head = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        before = len(tokenizer(head, add_special_tokens=False)["input_ids"])
        text = f"{head}{row['response']}<|im_end|>"
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            q, p = (
                models[name](ids).logits[0, before - 1 : -1, : len(tokenizer)].log_softmax(-1)
                for name in (student, "teacher")
            )
        target = ids[0, before:]
        ce -= q[torch.arange(len(target)), target].sum().item()
        forward += (p.exp() * (p - q)).sum().item()
        reverse += (q.exp() * (q - p)).sum().item()
        agree += (p.argmax(-1) == q.argmax(-1)).sum().item()
        tokens += len(target)
    found = {"ce": ce, "forward_kl": forward, "reverse_kl": reverse, "top1_agreement": agree}
    return {name: value / tokens for name, value in found.items()} | {"tokens": tokens}


def test_one_table_and_json(folders, tiny_tokenizer, tmp_path):
    given = [folders / "student", folders / "run", "--teacher", folders / "teacher"]
    given += ["--data", folders / "rows.jsonl", "--answers", 5, "--max-new-tokens", 6]
    result = invoke(*given, "--output", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    assert "ROUGE-L" in result.output
    assert "exact match" not in result.output
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    teacher, student, run = found["models"]
    assert [model["role"] for model in found["models"]] == ["teacher", "student", "student"]
    assert found["rows"] == 7
    assert run["model"] == str(folders / "run")
    assert teacher["forward_kl"] is None
    for values, name in ((student, "student"), (run, "run/student")):
        for key, expected in oracle(folders, name, tiny_tokenizer).items():
            assert values[key] == pytest.approx(expected, rel=1e-5), key
        assert 0 < values["calibration_error"] < 1
        assert 0 <= values["rouge_l"] <= 1
        assert values["exact_match"] is None
    alone = invoke(
        folders / "teacher", "--data", folders / "rows.jsonl", "--output", tmp_path / "alone.json"
    )
    assert alone.exit_code == 0, alone.output
    (only,) = json.loads((tmp_path / "alone.json").read_text(encoding="utf-8"))["models"]
    assert only["ce"] == teacher["ce"]
    assert "rouge_l" not in only


def test_many_models_have_a_line_each(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    names = [folders / "teacher", folders / "student", folders / "run"]
    for name in ("first", "second"):
        names.append(tmp_path / name)
        shutil.copytree(folders / "student", names[-1])
    result = invoke(*names, "--data", folders / "rows.jsonl", "--output", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    models = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["models"]
    lines = result.output.splitlines()
    for name, model in zip(names, models, strict=True):
        (line,) = [line for line in lines if line.startswith("│") and str(name) in line]
        assert f"{model['ce']:.4f}" in line


def test_all_models_are_asked_what_each_has_room_for(folders, tmp_path):
    small = tmp_path / "small"
    shutil.copytree(folders / "student", small)
    config = json.loads((small / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = 64
    (small / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rows = tmp_path / "rows.jsonl"
    long = {"prompt": "x" * 30, "response": "fits the context, with less than forty tokens after"}
    lines = "".join(json.dumps(row) + "\n" for row in (*ROWS, long))
    rows.write_text(lines, encoding="utf-8")
    result = invoke(
        *(folders / "student", small, "--data", rows, "--max-length", 64),
        *("--answers", 20, "--max-new-tokens", 25),
    )
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("answers: ")]
    assert line.startswith("answers: to 7 of 8 held-out prompts")
    assert "1 prompts that leave no room" in line


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_measured(folders, tmp_path):
    given = (folders / "student", "--data", folders / "rows.jsonl", "--output")
    with pytest.raises(InputError, match=r"--output .*: is a folder; choose a file"):
        invoke(*given, tmp_path)
    assert not list(tmp_path.iterdir())
    if sys.platform == "linux":  # where not even root may make a file
        with pytest.raises(InputError, match=r"--output .*: the folder /proc cannot be written"):
            invoke(*given, "/proc/found.json")


def test_the_table_is_shown_though_the_file_cannot_be_written(folders, tmp_path):
    # Long enough that the partial file's name, which is longer still, is refused by the system.
    given = (
        folders / "student",
        "--data",
        folders / "rows.jsonl",
        "--output",
        tmp_path / ("x" * 250),
    )
    result = CliRunner().invoke(cli, ["evaluate", *map(str, given)])
    assert isinstance(result.exception, OSError)
    assert "cross-entropy" in result.output


def test_bad_input_is_one_line(folders, tmp_path, tiny_tokenizer):
    rows = folders / "rows.jsonl"
    with pytest.raises(InputError, match=r"no such file or folder"):
        invoke(folders / "nothing-here", "--data", rows)
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=r"empty|no rows"):
        invoke(folders / "student", "--data", tmp_path / "empty.jsonl")
    with pytest.raises(InputError, match=r"the folder .* does not exist"):
        invoke(folders / "student", "--data", rows, "--output", tmp_path / "no" / "x.json")
    with pytest.raises(InputError, match=r"loss\.schedules=.* not valid YAML"):
        invoke(folders / "student", "--data", rows, "--set", "loss.schedules={kd_ratio: {")
    with pytest.raises(InputError, match=r"evaluation\.answers"):
        invoke(folders / "student", "--data", rows, "--answers", "many")
    foreign = copy.deepcopy(tiny_tokenizer)
    foreign.add_tokens(["question"])
    folder = tmp_path / "foreign"
    transformers.LlamaForCausalLM.from_pretrained(folders / "student").save_pretrained(folder)
    foreign.save_pretrained(folder)
    with pytest.raises(InputError, match="which only one of the models knows"):
        invoke(folder, "--teacher", folders / "teacher", "--data", rows)
