"""Tasks of lm-eval on loaded models, against log-probabilities computed here."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

from kdrun.cli import cli
from kdrun.errors import InputError
from kdrun.evaluation.tasks import TaskChoice, Tasks, read_scores

# What lm-eval and the packages below it are warned of.
pytestmark = pytest.mark.filterwarnings("default")

FOLDER = Path(__file__).parents[3] / "docs" / "recipes" / "tasks"
NAMES = ("truthfulqa_mc1_file", "truthfulqa_mc2_file")
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="the package lm-eval is not installed",
)


@pytest.fixture(scope="module")
def model_folder(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with room for the examples that stand before each question."""
    folder = tmp_path_factory.mktemp("tasks") / "model"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.05,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def invoke(*arguments: object) -> Any:
    wide = CliRunner(env={"COLUMNS": "400"})
    return wide.invoke(cli, ["evaluate", *map(str, arguments)], catch_exceptions=False)


def examples() -> str:
    """The six questions and answers that stand before each question, rendered by jinja itself."""
    import jinja2
    import lm_eval
    import yaml

    file = Path(str(lm_eval.__file__)).parent / "tasks" / "truthfulqa" / "truthfulqa_mc1.yaml"
    template = yaml.safe_load(file.read_text(encoding="utf-8"))["doc_to_text"]
    whole = jinja2.Environment().from_string(template).render(question="QUESTION")
    before, after = whole.split("QUESTION")
    assert after == "\nA:"
    return before


def log_probability(model: Any, tokenizer: Any, context: str, answer: str) -> float:
    """Of an answer behind a context, alone and without padding."""
    start = len(tokenizer(context, add_special_tokens=False)["input_ids"])
    ids = tokenizer(f"{context} {answer}", add_special_tokens=False, return_tensors="pt")
    tokens = ids["input_ids"]
    with torch.no_grad():
        logs = model(tokens).logits[0].double().log_softmax(-1)
    found = logs[torch.arange(start - 1, tokens.shape[1] - 1), tokens[0, start:]]
    return float(found.sum())


@needs_lm_eval
@pytest.mark.slow
def test_both_metrics_of_truthfulqa_from_a_file(
    model_folder: Path,
    shared_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # which is no repository
    rows = json.loads((shared_data / "truthfulqa_mc.json").read_text(encoding="utf-8"))
    chosen = [rows[number] for number in (0, 1, 5, 40)]
    # Which answer comes first must have no say.
    chosen[1]["mc1_targets"] = dict(reversed(chosen[1]["mc1_targets"].items()))
    chosen[2]["mc2_targets"] = dict(reversed(chosen[2]["mc2_targets"].items()))
    file = tmp_path / "questions.json"
    file.write_text(json.dumps(chosen), encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder).eval()
    mc1, mc2 = [], []
    for row in chosen:
        context = f"{examples()}{row['question']}\nA:"
        logs = {
            answer: log_probability(model, tokenizer, context, answer)
            for answer in {**row["mc1_targets"], **row["mc2_targets"]}
        }
        best = max(row["mc1_targets"], key=lambda answer: logs[answer])
        mc1.append(float(row["mc1_targets"][best]))
        shares = {answer: math.exp(logs[answer]) for answer in row["mc2_targets"]}
        true = sum(share for answer, share in shares.items() if row["mc2_targets"][answer])
        mc2.append(true / sum(shares.values()))
    result = invoke(
        *(model_folder, "--task", NAMES[0], "--task", NAMES[1], "--task-folder", FOLDER),
        *("--task-data", file, "--batch-size", 3, "--output", tmp_path / "found.json"),
    )
    assert result.exit_code == 0, result.output
    assert "truthfulqa_mc2_file acc" in result.output
    assert "4 questions, higher is better" in result.output
    assert "git" not in capfd.readouterr().err
    report = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert report["tasks"]["names"] == list(NAMES)
    assert "rows" not in report
    assert report["versions"]["lm_eval"]
    (found,) = report["models"]
    for score, name, expected in zip(found["tasks"], NAMES, (mc1, mc2), strict=True):
        mean = sum(expected) / 4
        assert (score["task"], score["metric"], score["questions"]) == (name, "acc", 4)
        assert score["value"] == pytest.approx(mean, rel=1e-4)
        error = math.sqrt(sum((x - mean) ** 2 for x in expected) / 3 / 4)
        assert score["stderr"] == pytest.approx(error, rel=1e-3, abs=1e-9)
    limited = invoke(
        *(model_folder, "--task", NAMES[1], "--task-folder", FOLDER, "--task-data", file),
        *("--task-limit", 2, "--output", tmp_path / "two.json"),
    )
    assert limited.exit_code == 0, limited.output
    (one,) = json.loads((tmp_path / "two.json").read_text(encoding="utf-8"))["models"]
    assert one["tasks"][0]["value"] == pytest.approx(sum(mc2[:2]) / 2, rel=1e-4)


@needs_lm_eval
def test_wrong_tasks_are_one_line(model_folder: Path, tmp_path: Path) -> None:
    own = ("--task-folder", FOLDER)
    with pytest.raises(InputError, match=r"truthfulqa_mc2_file: its questions .*--task-data"):
        invoke(model_folder, "--task", "truthfulqa_mc2_file", *own)
    with pytest.raises(InputError, match=r"--task-data .*not found"):
        invoke(model_folder, "--task", NAMES[0], *own, "--task-data", tmp_path / "none.json")
    with pytest.raises(InputError, match=r"--task-folder .*not found"):
        invoke(model_folder, "--task", NAMES[0], "--task-folder", tmp_path / "none")


@needs_lm_eval
@pytest.mark.slow
def test_an_unknown_task_is_answered_with_close_ones(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="hellaswagg: no such task; did you mean hellaswag"):
        invoke(model_folder, "--task", "hellaswagg")


def test_without_rows_and_tasks_there_is_nothing_to_measure(model_folder: Path) -> None:
    with pytest.raises(InputError, match="--data, or tasks with --task"):
        invoke(model_folder)
    alone = invoke(model_folder, "--task-limit", 3)
    assert alone.exit_code == 2
    assert "requires --task" in alone.output


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"pip install 'kdlosses\[lm-eval\]'"):
        Tasks(TaskChoice(names=("hellaswag",)))


def test_scores_are_read_with_their_errors_where_there_are_any() -> None:
    scores = read_scores(
        {
            "results": {
                "one": {"alias": "one", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 9},
                "two": {"em,strict": 1.0, "em_stderr,strict": "N/A", "ppl,none": 7},
            },
            "n-samples": {"one": {"original": 20, "effective": 9}},
            "higher_is_better": {"one": {"acc": True}, "two": {"ppl": False}},
        }
    )
    assert [(s.title, s.value, s.stderr, s.questions, s.higher_is_better) for s in scores] == [
        ("one acc", 0.5, 0.1, 9, True),
        ("two em,strict", 1.0, None, None, None),
        ("two ppl", 7.0, None, None, False),
    ]
    assert scores[0].shown == "0.5000 ± 0.1000"
    assert scores[0].explained == "9 questions, higher is better"
