"""The command line as a process: what it prints, what it leaves, its exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from commands import heed_interrupts, kdrun

from kdrun.errors import InputError
from kdrun.run.folder import prepare_folder

KDRUN = Path(sys.executable).with_name("kdrun")


def refused(*arguments: object, cwd: Path | None = None) -> str:
    """Run a command that must end with exit code 2 and one line; return the line."""
    done = kdrun(*arguments, cwd=cwd)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1, done.stderr
    return lines[0]


QUICK = ("--max-steps", 4, "--set", "training.logging_steps=2", "--set", "loss.compiled=false")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A short run of the built-in pair, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    done = kdrun("--loss", "forward_kl_chunked", "--kd-ratio", 0.5, *QUICK, "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stderr


def test_a_run_leaves_the_folder_of_the_contract(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert config["loss"]["kd_ratio"] == 0.5
    assert config["loss"]["chunk_size"] > 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [2, 4]
    for line in training:
        assert {"class_loss", "kd_loss", "lr", "grad_norm"} <= line.keys()
        assert line["supervised_tokens_per_second"] > 0
        assert line["loss"] == pytest.approx(
            0.5 * line["class_loss"] + 0.5 * line["kd_loss"], abs=2e-4
        )
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("eval_ce", "eval_forward_kl", "eval_reverse_kl", "eval_top1_agreement"):
        assert isinstance(summary["before"][key], float)
        assert isinstance(summary["after"][key], float)
    assert summary["after"]["eval_ce"] < summary["before"]["eval_ce"]
    assert summary["seed"] == 0
    assert summary["versions"]["torch"]
    assert "student: " in printed
    assert "cross-entropy" in printed


def test_r13_the_student_loads_by_itself(finished: tuple[Path, str]) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    student = finished[0] / "student"
    model = AutoModelForCausalLM.from_pretrained(student)
    tokenizer = AutoTokenizer.from_pretrained(student)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.chat_template
    with safe_open(student / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert all(name.startswith("model.") for name in names)
    size = (student / "model.safetensors").stat().st_size
    assert size < 1.1 * 4 * sum(parameter.numel() for parameter in model.parameters())


def test_a_folder_that_holds_a_run_is_refused_and_untouched(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    line = refused("--output", folder)
    assert "already contains a run" in line
    assert "--overwrite" in line
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_wrong_input_found_late_costs_no_finished_run(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    before = sorted(folder.rglob("*"))
    line = refused("--output", folder, "--overwrite", "--max-length", 100_000)
    assert "data.max_length" in line
    assert sorted(folder.rglob("*")) == before


def test_what_a_refused_start_leaves_is_no_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    prepare_folder(tmp_path, resume=False, overwrite=False)
    (tmp_path / "checkpoints" / "mine").touch()
    with pytest.raises(InputError, match="contains no run"):
        prepare_folder(tmp_path, resume=False, overwrite=True)


@pytest.mark.slow
def test_the_written_configuration_repeats_the_run(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    folder, _ = finished
    done = kdrun("--config", folder / "config.yaml", "--output", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        (place / "student" / "model.safetensors").read_bytes()
        for place in (folder, tmp_path / "again")
    )
    assert ours == theirs


@pytest.mark.slow
def test_interrupted_runs_are_saved_and_resumed_to_the_same_student(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen(
        [KDRUN, *map(str, ("--loss", "forward_kl_chunked", *QUICK, "--output", folder))],
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        preexec_fn=heed_interrupts,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 0"):
                time.sleep(0.3)
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    assert "--resume" in rest
    assert not (folder / "summary.json").exists()
    done = kdrun("--resume", "--output", folder)
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        (place / "student" / "model.safetensors").read_bytes() for place in (finished[0], folder)
    )
    assert ours == theirs


def test_resuming_a_finished_run_does_nothing_and_one_without_a_summary_is_completed(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    summary = json.loads((folder / "summary.json").read_text())
    weights = (folder / "student" / "model.safetensors").read_bytes()
    done = kdrun("--resume", "--output", folder)
    assert done.returncode == 0, done.stderr
    assert "is finished" in done.stderr
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "student")
    done = kdrun("--resume", "--output", folder)
    assert done.returncode == 0, done.stderr
    again = json.loads((folder / "summary.json").read_text())
    assert again["steps"] == summary["steps"]
    assert again["before"] == summary["before"]
    assert again["after"] == summary["after"]
    assert (folder / "student" / "model.safetensors").read_bytes() == weights


def test_a_learner_without_teacher_reports_null_measures(tmp_path: Path) -> None:
    folder = tmp_path / "ce"
    done = kdrun("--teacher", "none", "--kd-ratio", 0, *QUICK, "--output", folder)
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["after"]["eval_ce"] < summary["before"]["eval_ce"]
    assert summary["after"]["eval_forward_kl"] is None


@pytest.mark.parametrize(
    ("arguments", "shown", "loaded"),
    [
        (["--help"], "--kd-ratio", []),
        (["losses", "list"], "generalized_jsd", []),
        (["features", "list"], "token_relation", []),
        (["config"], "kd_ratio", ["pydantic", "yaml"]),  # which it prints
    ],
)
def test_help_and_lists_are_quick_and_load_nothing_heavy(
    arguments: list[str], shown: str, loaded: list[str]
) -> None:
    code = (
        f"import sys; from kdrun.cli import cli; cli.main({arguments}, standalone_mode=False); "
        "print(sorted({'torch', 'transformers', 'pydantic', 'yaml'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(loaded)
    assert shown in done.stdout


def test_the_version_is_shown() -> None:
    assert kdrun("--version").stdout.startswith("kdrun 0.")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--loss", "forward_lk_chunked"), ("unknown loss", "did you mean 'forward_kl'")),
        (("--loss", "skew_forward_kl:alpha=2"), ("alpha", "less than 1")),
        (("--loss", "skew_forward_kl:beta=0.1"), ("no parameter 'beta'", "alpha")),
        (("--kd-ratio", "1.5"), ("loss.kd_ratio", "less than or equal to 1")),
        (("--set", "loss.temprature=2"), ("loss.temprature", "did you mean 'loss.temperature'")),
        (("--set", "optimiser.lr=1"), ("optimiser", "did you mean 'optimizer'")),
        (("--set", "loss.temperature"), ("section.key=value",)),
        (("--teacher", "somewhere"), ("--student", "init-student")),
        (("--student", "somewhere"), ("--teacher",)),
        (("--teacher", "none"), ("--kd-ratio 0",)),
        (("--config", "missing.yaml"), ("missing.yaml", "No such file")),
        (("--resume",), ("--output",)),
    ],
)
def test_wrong_options_are_told_in_one_line(
    arguments: tuple[str, ...], expected: tuple[str, ...], tmp_path: Path
) -> None:
    line = refused(*arguments, cwd=tmp_path)
    assert all(part in line for part in expected), line
    assert not list(tmp_path.iterdir())


def builtin_teacher() -> Path:
    from kdrun.builtin import TEACHER_DIR

    return TEACHER_DIR


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, ("rows.jsonl", "no such file")),
        (b"", ("rows.jsonl", "empty")),
        (b'{"prompt": "a", "response": "b"}\n{"prompt": \n', ("rows.jsonl", "line 2")),
        (b'{"prompt": "a"}\n{"prompt": "b"}\n', ("rows.jsonl",)),
        (b'{"prompt": "a", "response": ""}\n', ("rows.jsonl",)),
    ],
)
def test_wrong_data_is_told_in_one_line(
    content: bytes | None, expected: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    if content is not None:
        file.write_bytes(content)
    teacher = builtin_teacher()
    line = refused(
        "--teacher", teacher, "--student", teacher, "--data", file, "--output", tmp_path / "run"
    )
    assert all(part in line for part in expected), line


def test_rows_whose_prompts_leave_no_room_are_told_with_the_length(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    row = json.dumps({"prompt": "word " * 100, "response": "five words are not much"})
    file.write_text(f"{row}\n{row.replace('five', 'six')}\n", encoding="utf-8")
    teacher = builtin_teacher()
    line = refused(
        *("--teacher", teacher, "--student", teacher, "--data", file),
        *("--max-length", 64, "--output", tmp_path / "run"),
    )
    assert "max_length" in line


def test_other_tokenizers_are_refused_before_weights_are_loaded(tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(builtin_teacher(), student)
    (student / "model.safetensors").unlink()  # loading it would fail with another message
    tokenizer = json.loads((student / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[40:42]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (student / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    line = refused(
        *("--teacher", builtin_teacher(), "--student", student, "--data", "builtin"),
        *("--output", tmp_path / "run"),
    )
    assert "tokenizers" in line
    assert repr(one) in line


def test_options_of_a_run_before_a_command_are_refused() -> None:
    done = kdrun("--loss", "forward_kl", "losses", "list")
    assert done.returncode == 2
    assert "no effect" in done.stderr


def test_a_mistyped_command_is_answered_with_a_close_one() -> None:
    done = kdrun("loses", "list")
    assert done.returncode == 2
    assert "'losses'" in done.stderr


def test_losses_are_listed_with_their_distribution() -> None:
    done = kdrun("losses", "list")
    assert done.returncode == 0
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert ["forward_kl", "kdlosses"] in rows
    assert not any(row[0].endswith("_chunked") for row in rows)
    details = kdrun("losses", "list", "--details").stdout
    assert (
        "generalized_jsd  kdlosses  additive  beta=0.5, normalize=False\n"
        "    beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q\n"
        "    Agarwal et al. 2024 (Generalized Knowledge Distillation), arXiv:2306.13649.\n"
    ) in details


def test_a_loss_is_shown_with_formula_and_bounds() -> None:
    done = kdrun("losses", "show", "skew_forward_kl")
    assert done.returncode == 0
    for part in ("KL(p || alpha p + (1 - alpha) q)", "alpha", "2402.03898", "curvature: 0.81"):
        assert part in done.stdout


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "writable" in refused("--output", tmp_path / "run")


def test_generate_answers_from_a_run(finished: tuple[Path, str]) -> None:
    done = kdrun(
        *("generate", finished[0], "--prompt", "The"),
        *("--max-new-tokens", 8),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_generate_renders_a_prompt_as_the_run_did(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] + style.mark + m['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant' + style.mark }}{% endif %}"
    )
    rows, run = tmp_path / "rows.jsonl", tmp_path / "run"
    rows.write_text("".join(f'{{"prompt": "{n}?", "response": "{n}."}}\n' for n in range(40)))
    done = kdrun(
        *("--data", rows, "--max-steps", 1, "--output", run, "--set", f"data.template={template}"),
        *("--set", "data.template_arguments={style: {mark: '> '}}"),
    )
    assert done.returncode == 0, done.stderr
    assert (run / "student" / "chat_template.jinja").read_text() == template.read_text()
    ask = ("--prompt", "7?", "--max-new-tokens", 4)
    assert kdrun("generate", run, *ask).returncode == 0
    # The student alone does not know the variables of its template.
    line = refused("generate", run / "student", *ask)
    assert "--prompt is rejected by the chat template ('style' is undefined)" in line
    assert "folder of a run" in line
