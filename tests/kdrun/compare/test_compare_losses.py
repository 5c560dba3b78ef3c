"""The command on the built-in pair: real trials, resumed, extended, diverged, refused."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SMALL = ("--max-steps", "4", "--seeds", "2", "--set", "loss.compiled=false")
COMMAND = (sys.executable, "-c", "from kdrun.cli import main; main()", "compare-losses")


def compare(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *SMALL, *arguments, "--output", str(folder)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"COLUMNS": "200"},
        check=False,
    )


def times(folder: Path) -> dict[str, float]:
    return {path.name: path.stat().st_mtime for path in (folder / "records").iterdir()}


@pytest.mark.slow
def test_a_comparison_resumes_extends_and_judges(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    # Killed amid the second trial.
    with subprocess.Popen(
        [*COMMAND, *SMALL, "--loss", "forward_kl_chunked", "--output", str(folder)],
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 240
        while not list((folder / "records").glob("*.json")) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    first = times(folder)
    assert 1 <= len(first) < 4
    done = compare(folder, "--loss", "forward_kl_chunked")
    assert done.returncode == 0, done.stderr
    second = times(folder)
    assert len(second) == 4
    assert all(second[name] == moment for name, moment in first.items())  # nothing ran twice
    # Another loss runs alone.
    done = compare(folder, "--loss", "forward_kl_chunked", "--loss", "reverse_kl_chunked")
    assert done.returncode == 0, done.stderr
    third = times(folder)
    assert len(third) == 6
    assert all(third[name] == moment for name, moment in second.items())
    assert "reverse_kl_chunked" in done.stderr
    assert "baseline" in done.stderr
    with open(folder / "results.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["loss"] for row in rows} == {
        "cross-entropy", "forward_kl_chunked", "reverse_kl_chunked",
    }  # fmt: skip
    assert {row["status"] for row in rows} == {"done"}
    assert all(float(row["ce"]) > 0 for row in rows)
    # The folder belongs to its settings.
    done = compare(folder, "--max-steps", "5")
    assert done.returncode == 2
    assert "training.max_steps=4, now 5" in done.stderr


@pytest.mark.slow
def test_a_diverged_trial_is_recorded_and_counts_against_its_arm(tmp_path: Path) -> None:
    done = compare(
        tmp_path / "c",
        *("--loss", "forward_kl_chunked", "--lr", "1e6"),
        *("--set", "optimizer.max_grad_norm=0", "--set", "optimizer.warmup_steps=0"),
        *("--set", "training.max_steps=8"),
    )
    assert done.returncode == 0, done.stderr
    assert "diverged: " in done.stderr


@pytest.mark.slow
def test_several_processes_share_the_trials(tmp_path: Path) -> None:
    done = compare(tmp_path / "c", "--loss", "forward_kl_chunked", "--jobs", "2")
    assert done.returncode == 0, done.stderr
    assert len(times(tmp_path / "c")) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--loss", "forwrd_kl"), "did you mean 'forward_kl'"),
        (("--loss", "skew_forward_kl:alpha=2"), "alpha"),
        (("--yardstick", "bleu"), "no such measure"),
        (("--difference", "0"), "must be above 0"),
        (("--kd-ratio", "0"), "the baseline at 0 is always there"),
        (("--student", "nowhere", "--teacher", "nowhere"), "nowhere"),
    ],
)
def test_wrong_input_is_refused_before_anything_starts(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = compare(tmp_path / "c", *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "c").exists()


def test_a_dry_run_shows_trials_and_time_and_writes_nothing(tmp_path: Path) -> None:
    done = compare(tmp_path / "c", "--dry-run", "--kd-ratio", "0.25", "--kd-ratio", "1")
    assert done.returncode == 0, done.stderr
    assert "tuning" in done.stderr
    assert "time: about" in done.stderr
    assert not (tmp_path / "c").exists()
