"""Failures reported in the field, as small runs with their right outcomes.

The numbers are those of the reports; each test stands for a kind.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import kdrun
from words import CHAT, WORDS, save_model, save_rows, save_speaker, save_tokenizer, usual_rows

END = len(WORDS)
Make = Callable[..., tuple[str, ...]]


@pytest.fixture
def pair(tmp_path: Path) -> Make:
    """Makes a pair with a chat template; gives the options of a run with it."""

    def make(template: str | None = CHAT, special: tuple[str, ...] = ("<end>",), **settings: Any):
        for name, seed in (("teacher", 1), ("student", 2)):
            folder = tmp_path / name
            own = settings if name == "student" else {}
            save_model(folder, END + len(special), seed, **own)
            save_tokenizer(folder, special, template)
        rows = save_rows(tmp_path / "rows.jsonl", usual_rows())
        options = ("--teacher", tmp_path / "teacher", "--student", tmp_path / "student")
        more = ("--data", rows, "--max-length", 32, "--batch-size", 2, "--max-steps", 2)
        return tuple(map(str, (*options, *more, "--set", "data.cache_dir=none")))

    return make


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def one_line(done: Any) -> str:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("kdrun: ")]
    return line


def test_p5_modules_of_one_system_are_imported_where_they_are_used() -> None:
    code = (
        "import sys; sys.modules['resource'] = sys.modules['fcntl'] = None; "
        "import kdrun.run.distill, kdrun.run.evaluate, kdrun.compare.ledger, kdrun.compare.trial, "
        "kdrun.compare.command, kdrun.cache.command, kdrun.cli"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("merged", [False, True])
def test_p9_the_saved_student_stops_where_answers_were_taught_to_end(
    pair: Make, tmp_path: Path, merged: bool
) -> None:
    adapters = ("--lora-rank", "2", "--set", "lora.merge=true") if merged else ()
    done = kdrun(*pair(), *adapters, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "run/student/generation_config.json")["eos_token_id"] == [2, END]
    for checkpoint in (tmp_path / "run/checkpoints").glob("checkpoint-*"):
        if not merged:
            assert read(checkpoint / "generation_config.json")["eos_token_id"] == [2, END]


def test_p9_a_server_that_knows_nothing_of_kdrun_gives_the_same_answer(
    pair: Make, tmp_path: Path
) -> None:
    """transformers' generate, with nothing but what the student's folder holds."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kdrun.models.generation import answer

    options = pair()
    names = {word: number for number, word in enumerate([*WORDS, "<end>"])}
    follow = {names["assistant"]: names["sat"], names["sat"]: names["on"], names["on"]: END}
    save_speaker(tmp_path / "student", END + 1, follow, names["mat"])
    done = kdrun(*options, "--lr", "1e-9", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    student = tmp_path / "run" / "student"
    ours = "".join(answer(str(tmp_path / "run"), "the cat", 20, 0.0, 0, False))
    model = AutoModelForCausalLM.from_pretrained(student)
    tokenizer = AutoTokenizer.from_pretrained(student)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the cat"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    output = model.generate(ids, attention_mask=ids != -1, max_new_tokens=20, do_sample=False)
    new = output[0, ids.shape[1] :].tolist()
    assert new == [names["sat"], names["on"], END]
    assert tokenizer.decode(new, skip_special_tokens=True) == ours == "sat on"


def test_p10_a_writer_stops_at_its_own_end_tokens(pair: Make, tmp_path: Path) -> None:
    options = pair(template=None, special=("<eot>",))
    names = {word: number for number, word in enumerate(WORDS)}
    save_speaker(
        tmp_path / "teacher", END + 1, {names["sat"]: END, END: names["mat"]}, names["sat"]
    )
    path = tmp_path / "teacher" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, END]}), encoding="utf-8")
    done = kdrun(
        *options, "--procedure", "seqkd", "--set", "data.cache_dir=" + str(tmp_path / "kept"),
        "--output", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "kept").glob("answers-*.json")
    assert {tuple(answer) for answer in read(file)} == {(names["sat"], END), (END,)}
    assert "'<eot>'" in done.stderr
    assert read(tmp_path / "run/student/generation_config.json")["eos_token_id"] == [2, END]


@pytest.mark.parametrize("sampled", [{"temperature": 0.6, "top_p": 0.9}, {"top_k": 7}])
def test_p16_generation_settings_that_cannot_be_saved_are_mended_before_training(
    pair: Make, tmp_path: Path, sampled: dict[str, Any]
) -> None:
    done = kdrun(*pair(eos_token_id=2, **sampled), "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stderr.index("do_sample=true is added") < done.stderr.index("step 0")
    kept = read(tmp_path / "run/student/generation_config.json")
    assert kept["do_sample"] is True
    assert {name: kept[name] for name in sampled} == sampled


def test_p8_a_cache_of_another_day_serves_and_a_run_keeps_its_day(
    pair: Make, tmp_path: Path
) -> None:
    """Two time zones show what a night does: the template writes the day of the month."""
    dated = "{{ strftime_now('%d') }} " + CHAT
    options, cache = pair(template=dated), tmp_path / "cache"
    west, east = "Etc/GMT+12", "Etc/GMT-14"
    built = kdrun("cache-teacher", *options[:-6], "--output", cache, TZ=west)
    assert built.returncode == 0, built.stderr
    cached = (*options[2:], "--teacher-cache", cache)
    done = kdrun(*cached, "--output", tmp_path / "run", TZ=east)
    assert done.returncode == 0, done.stderr
    # A resumed run and its repetition take the day of the run.
    text = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    day = re.search(r"date: '?(\d{4}-\d\d-\d\d)", text)
    assert day is not None
    assert read(cache / "manifest.json")["date"] == day[1]
    on = kdrun("--resume", "--output", tmp_path / "run", "--max-steps", 3, TZ=east)
    assert on.returncode == 0, on.stderr
    other = kdrun(*cached, "--set", "data.date=2020-01-01", "--output", tmp_path / "other")
    assert "rendered with the date" in one_line(other)


def test_p8_a_build_that_is_continued_on_another_day_keeps_its_day(
    pair: Make, tmp_path: Path
) -> None:
    options, cache = pair(template="{{ strftime_now('%d') }} " + CHAT), tmp_path / "cache"
    command = ("cache-teacher", *options[:-6], "--output", cache)
    assert kdrun(*command, TZ="Etc/GMT+12").returncode == 0
    before = files(cache)
    (cache / "manifest.json").unlink()  # the only file that an interrupted build lacks
    done = kdrun(*command, TZ="Etc/GMT-14")
    assert done.returncode == 0, done.stderr
    assert "rows are there already; going on" in done.stderr
    assert files(cache) == before
    (cache / "manifest.json").unlink()
    other = kdrun(*command, "--set", "data.date=2020-01-01")
    assert "date in the rows (data.date) differs" in one_line(other)


def test_p13_resume_on_rows_that_changed_since_is_refused(pair: Make, tmp_path: Path) -> None:
    run, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    options = (*pair(), "--eval-data", save_rows(tmp_path / "eval.jsonl", usual_rows(3)))
    assert kdrun(*options, "--output", run).returncode == 0
    before = files(run)
    text = rows.read_text(encoding="utf-8")
    rows.write_text(text.replace('"sat on d"', '"sat on mat"'), encoding="utf-8")
    assert rows.read_text(encoding="utf-8") != text
    line = one_line(kdrun("--resume", "--output", run, "--max-steps", 4))
    number = 1 + [row["response"] for row in usual_rows()].index("sat on d")
    assert f"rows.jsonl, line {number} has changed since the run began" in line
    assert "data.accept_changes=true" in line
    assert files(run) == before
    go_on = ("--resume", "--output", run, "--max-steps", 4, "--set", "data.accept_changes=true")
    assert kdrun(*go_on).returncode == 0
    (change,) = read(run / "summary.json")["accepted_changes"]
    assert "has changed since" in change
    # Once accepted, the rows are the run's; held-out rows count likewise.
    assert kdrun("--resume", "--output", run, "--max-steps", 5).returncode == 0
    save_rows(tmp_path / "eval.jsonl", usual_rows(2))
    line = one_line(kdrun("--resume", "--output", run, "--max-steps", 6))
    assert "held-out rows: there were 3 when the run began, and there are 2" in line


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--set", "data.max_length=16"), "data.max_length was 32 when the run began and is 16"),
        (("--lr", "0.5"), "optimizer.lr was 0.0001 when the run began and is 0.5"),
        (("--set", "optimizer.weight_decay=0.5"), "optimizer.weight_decay"),
        (("--batch-size", "3"), "a step had 2 rows when the run began (training.batch_size 2"),
        (("--seed", "7"), "training.seed was 0"),
        (("--lora-rank", "2"), "lora.rank was None"),
        (("--loss", "reverse_kl_chunked"), "loss.spec was 'forward_kl_chunked'"),
        (("--procedure", "gkd:lambda=0.5"), "procedure.spec was None"),
        (("--set", "model.dtype=bfloat16"), "model.student_dtype was 'float32'"),
    ],
)
def test_f8_f20_f22_f23_a_refused_resume_leaves_the_run_as_it_was(
    pair: Make, tmp_path: Path, change: tuple[str, ...], said: str
) -> None:
    run = tmp_path / "run"
    assert kdrun(*pair(), "--output", run).returncode == 0
    before = files(run)
    line = one_line(kdrun("--resume", "--output", run, "--max-steps", 4, *change))
    assert said in line
    assert files(run) == before
    assert kdrun("--resume", "--output", run, "--max-steps", 4).returncode == 0


def test_f22_settings_that_may_change_are_told(pair: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert kdrun(*pair(), "--output", run).returncode == 0
    done = kdrun("--resume", "--output", run, "--max-steps", 4, "--kd-ratio", 0.9)
    assert done.returncode == 0, done.stderr
    (line,) = [
        line for line in done.stderr.splitlines() if line.startswith("changed from here on: ")
    ]
    assert "loss.kd_ratio 0.9 (was 0.5)" in line
    assert "training.max_steps 4 (was 2)" in line


def test_f88_a_finished_run_that_is_trained_on_steps_at_the_longer_schedules_rate(
    pair: Make, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = (*pair(), "--set", "training.logging_steps=1")
    assert kdrun(*options, "--output", run).returncode == 0
    done = kdrun("--resume", "--output", run, "--max-steps", 4)
    assert done.returncode == 0, done.stderr
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = {line["step"]: line["lr"] for line in map(json.loads, lines) if "lr" in line}
    # Half way down the cosine, then three quarters.
    assert rates[3] == pytest.approx(1e-4 * 0.5, rel=1e-5)
    assert rates[4] == pytest.approx(1e-4 * 0.1464466, rel=1e-5)
    weights = files(run / "checkpoints")
    assert weights["checkpoint-2/model.safetensors"] != weights["checkpoint-4/model.safetensors"]


def test_f67_a_damaged_line_of_the_metrics_costs_nothing_else(pair: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert kdrun(*pair(), "--set", "training.logging_steps=1", "--output", run).returncode == 0
    path = run / "metrics.jsonl"
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([first, "\0\0" + rest[0], '{"no": "step"}', *rest]), encoding="utf-8")
    assert kdrun("--resume", "--output", run, "--max-steps", 3).returncode == 0
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [first, *rest] == lines[: 1 + len(rest)]
    assert (run / "metrics.jsonl.damaged").is_file()


def test_p20_wandb_without_a_login_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdrun.errors import InputError
    from kdrun.run import trackers

    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="wandb is not logged in; run 'wandb login'"):
        trackers.check_tracker("wandb")
    login = tmp_path / ".netrc"
    login.write_text("machine api.wandb.ai login user password secret\n", encoding="utf-8")
    login.chmod(0o600)
    trackers.check_tracker("wandb")
    login.unlink()
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers.check_tracker("wandb")


class Refusing:
    """A tracker that cannot reach its server."""

    _initialized = False

    def setup(self, *arguments: Any) -> None:
        raise ConnectionError("no route to\nthe tracker")


def test_p20_a_tracker_that_cannot_begin_ends_the_run_before_the_training() -> None:
    from types import SimpleNamespace

    from kdrun.errors import InputError
    from kdrun.run.trackers import start_trackers

    handler = SimpleNamespace(callbacks=[Refusing()])
    trainer: Any = SimpleNamespace(callback_handler=handler, args=None, state=None, model=None)
    with pytest.raises(InputError, match=r"mlflow: the tracker cannot start \(no route to the tr"):
        start_trackers(trainer, "mlflow")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT"])
@pytest.mark.parametrize("moment", ["step", "evaluation"])
def test_p6_signals_of_schedulers_save_the_work(
    pair: Make, tmp_path: Path, name: str, moment: str
) -> None:
    signum, steps = getattr(signal, name), 40
    every = 1 if moment == "evaluation" else 1000
    options = [*pair(), "--max-steps", steps, "--set", f"training.eval_steps={every}"]
    options += ["--set", "training.logging_steps=1"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert kdrun(*options, "--output", whole).returncode == 0
    command = [sys.executable, "-m", "kdrun", *map(str, options), "--output", str(stopped)]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        preexec_fn=lambda: [signal.signal(s, signal.SIG_DFL) for s in (signum, signal.SIGINT)],
    ) as process:
        wait_for_line(stopped / "metrics.jsonl", process)
        process.send_signal(signum)
        _, said = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.skip("the run was over before the signal came")
    assert process.returncode == 128 + signum, said
    assert "interrupted and saved at step" in said
    assert "Traceback" not in said
    assert kdrun("--resume", "--output", stopped).returncode == 0
    assert files(stopped / "student") == files(whole / "student")


def wait_for_line(path: Path, process: subprocess.Popen[str]) -> None:
    """Until a step has been logged."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if path.is_file() and '"class_loss"' in path.read_text(encoding="utf-8"):
            return
        time.sleep(0.005)


def test_p6_a_signal_before_the_training_ends_with_its_code(pair: Make, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, kdrun.cli as m, kdrun.run.distill as d\n"
        "d.prepare = lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"sys.argv = ['kdrun', *{[*pair(), '--output', str(tmp_path / 'run')]!r}]\n"
        "m.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 143, done.stderr
    assert done.stderr.splitlines()[-1] == "kdrun: stopped by SIGTERM"
    assert os.listdir(tmp_path / "run") == []
