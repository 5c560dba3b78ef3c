"""The command on the built-in pair: real trials, resumed, extended, diverged, refused."""

from __future__ import annotations

import csv
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from small import QUICK, compare, kdrun, options, refused, rows_file

from kdrun.compare.command import comparison_of
from kdrun.compare.teachers import check_named_cache
from kdrun.compare.trial import forget_peak_memory
from kdrun.errors import InputError

for package in ("scipy", "matplotlib", "jinja2"):
    pytest.importorskip(package)

COMMAND = (sys.executable, "-c", "from kdrun.cli import main; main()", "compare-losses", *QUICK)


@pytest.fixture
def given(tmp_path: Path) -> tuple[str, ...]:
    """Rows, seeds and folder of a comparison."""
    rows = rows_file(tmp_path)
    return ("--data", str(rows), "--seeds", "2", "--output", str(tmp_path / "c"))


def times(folder: Path) -> dict[str, float]:
    return {path.name: path.stat().st_mtime for path in (folder / "records").iterdir()}


@pytest.mark.slow
def test_a_comparison_resumes_extends_and_judges(tmp_path: Path, given: tuple[str, ...]) -> None:
    folder = tmp_path / "c"
    # Killed amid the second trial.
    with subprocess.Popen(
        [*COMMAND, "--loss", "forward_kl_chunked", *given], stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 240
        while not list((folder / "records").glob("*.json")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    first = times(folder)
    assert 1 <= len(first) < 4
    compare("--loss", "forward_kl_chunked", *given)
    second = times(folder)
    assert len(second) == 4
    assert all(second[name] == moment for name, moment in first.items())  # nothing ran twice
    # Another loss runs alone, and the report is that of the whole folder.
    printed = compare("--loss", "reverse_kl_chunked", *given)
    third = times(folder)
    assert len(third) == 6
    assert all(third[name] == moment for name, moment in second.items())
    assert "reverse_kl_chunked" in printed
    assert "forward_kl_chunked" in printed
    with open(folder / "results.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["loss"] for row in rows} == {
        "cross-entropy", "forward_kl_chunked", "reverse_kl_chunked",
    }  # fmt: skip
    assert {row["status"] for row in rows} == {"done"}
    assert all(float(row["ce"]) > 0 for row in rows)
    # The folder belongs to its settings.
    done = subprocess.run(
        [*COMMAND, *given, "--max-steps", "5"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 2
    assert "training.max_steps=3, now 5" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_diverged_trial_is_recorded_and_counts_against_its_arm(given: tuple[str, ...]) -> None:
    printed = compare(
        *("--loss", "forward_kl_chunked", "--lr", "1e6", *given, "--seeds", "1"),
        *("--set", "optimizer.max_grad_norm=0", "--set", "optimizer.warmup_steps=0"),
        *("--max-steps", "6"),
    )
    assert "diverged: " in printed


@pytest.mark.slow
@pytest.mark.distributed
def test_several_processes_share_the_trials(tmp_path: Path, given: tuple[str, ...]) -> None:
    done = subprocess.run(
        [*COMMAND, "--loss", "forward_kl_chunked", *given, "--seeds", "1", "--jobs", "2"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"COLUMNS": "200"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(times(tmp_path / "c")) == 2
    assert len(list((tmp_path / "c" / "teacher-cache").iterdir())) == 1


def test_the_peak_memory_of_a_trial_is_not_that_of_an_earlier_one() -> None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system cannot forget a peak")
    forget_peak_memory()  # imports what would count otherwise
    large = bytearray(400 * 2**20)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del large
    forget_peak_memory()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak - 300 * 2**10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--loss", "forwrd_kl"), "did you mean 'forward_kl'"),
        (("--loss", "skew_forward_kl:alpha=2"), "alpha"),
        (("--yardstick", "bleu"), "no such measure"),
        (("--difference", "0"), "must be above 0"),
        (("--difference", "inf"), "must be above 0, and finite"),
        (("--lr", "inf"), "must be above 0, and finite"),
        (("--kd-ratio", "0"), "the baseline at 0 is always there"),
        (("--teacher", "none"), "a comparison has a teacher"),
        (("--set", "loss.spec=reverse_kl"), "give --loss instead"),
        (("--set", "procedure.spec=gkd"), "give --procedure instead"),
        (("--set", "training.seed=3"), "give --seeds instead"),
        (("--yardstick", "rouge_l", "--set", "evaluation.answers=0"), "answers is 0; raise it"),
        (("--yardstick", "exact_match"), "set evaluation.answer_pattern"),
        (("--yardstick", "rouge_l", "--data", "builtin"), "are plain text, which asks nothing"),
        (("--max-length", "100000"), "holds 1024 tokens"),
        (("--no-teacher-cache", "--set", "model.teacher_cache=c"), "leave out one"),
        (("--student", "nowhere/at/all", "--teacher", "nowhere/at/all"), "nowhere"),
    ],
)
def test_wrong_input_is_refused_before_anything_starts(
    tmp_path: Path, given: tuple[str, ...], arguments: tuple[str, ...], message: str
) -> None:
    assert message in refused("compare-losses", *QUICK, *given, *arguments)
    assert not (tmp_path / "c").exists()


def test_a_named_cache_is_checked_with_every_loss(tmp_path: Path, given: tuple[str, ...]) -> None:
    cache, rows = tmp_path / "cache", given[1]
    kdrun("cache-teacher", "--data", rows, "--max-length", 32, "--kind", "top-k", "--output", cache)
    named = ("--teacher", "builtin", "--set", f"model.teacher_cache={cache}", "--dry-run")
    losses = ("--loss", "forward_kl_chunked", "--loss", "adaptive_kl_chunked")
    line = refused("compare-losses", *QUICK, *given, *named, *losses)
    assert "needs the teacher's whole row" in line
    shorter = (*QUICK, "--max-length", "24", *given, *named, *losses[:2])
    assert "lacks the row" in refused("compare-losses", *shorter)
    two = options(Path(rows), teachers=("builtin", "other"))
    overrides = (*two.overrides, ("model.teacher_cache", str(cache)))
    with pytest.raises(InputError, match="holds one teacher"):
        check_named_cache(comparison_of(replace(two, overrides=overrides)))


def test_a_dry_run_refuses_rows_that_are_not_there(tmp_path: Path) -> None:
    arguments = ("--data", tmp_path / "rows.json", "--dry-run")
    assert "no such file" in refused("compare-losses", *QUICK, *arguments)


def test_a_dry_run_shows_trials_and_time_and_writes_nothing(
    tmp_path: Path, given: tuple[str, ...]
) -> None:
    ratios = ("--kd-ratio", "0.25", "--kd-ratio", "1")
    printed = kdrun("compare-losses", *QUICK, *given, *ratios, "--dry-run").stderr
    assert "tuning" in printed
    assert "time: about" in printed
    assert "each teacher once over all rows" in printed
    assert not (tmp_path / "c").exists()
