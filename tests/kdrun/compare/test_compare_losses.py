"""The command on the built-in pair: real trials, resumed, extended, diverged, refused."""

from __future__ import annotations

import csv
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from commands import heed_interrupts
from small import QUICK, compare, kdrun, options, records, refused, rows_file

from kdrun.compare.command import comparison_of
from kdrun.compare.declare import declare
from kdrun.compare.ledger import Ledger
from kdrun.compare.teachers import check_named_cache
from kdrun.compare.trial import forget_peak_memory
from kdrun.errors import InputError

for package in ("scipy", "matplotlib", "jinja2"):
    pytest.importorskip(package)

COMMAND = (
    sys.executable,
    "-c",
    "from kdrun.cli import main; main()",
    "compare-losses",
    *QUICK,
)


@pytest.fixture
def given(tmp_path: Path) -> tuple[str, ...]:
    """Rows, seeds and folder of a comparison."""
    rows = rows_file(tmp_path)
    return ("--data", str(rows), "--seeds", "2", "--output", str(tmp_path / "c"))


def wait_for(what: Callable[[], object]) -> None:
    """Until something is so, or so long that it will never be."""
    deadline = time.monotonic() + 240
    while not what() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert what()


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
@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_ctrl_c_leaves_no_record_and_no_trial(
    tmp_path: Path, given: tuple[str, ...], jobs: int
) -> None:
    folder = tmp_path / "c"
    long = ("--max-steps", "2000", "--set", "training.logging_steps=1", "--jobs", str(jobs))
    with subprocess.Popen(
        [*COMMAND, *given, *long],
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,  # a terminal interrupts all processes of the command
        preexec_fn=heed_interrupts,
    ) as process:
        try:
            wait_for(lambda: [p for p in folder.glob("trials/*/metrics.jsonl") if p.stat().st_size])
            os.killpg(process.pid, signal.SIGINT)
            _, said = process.communicate(timeout=60)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # it would train for minutes
            raise
    assert process.returncode == 130, said
    assert f"kdrun: interrupted; run the same command with --output {folder}" in said
    assert "--resume" not in said  # a trial that was cut off runs again
    assert not list((folder / "records").iterdir())
    if jobs == 1:  # the processes of several are ended without being asked
        assert not list((folder / "trials").iterdir())


@pytest.mark.slow
def test_the_report_is_of_all_that_the_folder_has_come_to_declare(
    tmp_path: Path, given: tuple[str, ...]
) -> None:
    folder, once = tmp_path / "c", ("--seeds", "1")
    later = comparison_of(options(Path(given[1]), losses=("hellinger_chunked",)))
    declare(later, Ledger(tmp_path / "other"))  # what takes long at first is imported by now
    with subprocess.Popen(
        [*COMMAND, *given, *once, "--loss", "forward_kl_chunked"], stderr=subprocess.DEVNULL
    ) as process:
        wait_for((folder / "comparison.yaml").is_file)
        declare(later, Ledger(folder))
        assert len(times(folder)) < 2  # it was not at its report yet
    assert process.returncode == 0
    with open(folder / "results.csv", encoding="utf-8", newline="") as stream:
        statuses = {row["loss"]: row["status"] for row in csv.DictReader(stream)}
    assert statuses == {
        "cross-entropy": "done",
        "forward_kl_chunked": "done",
        "hellinger_chunked": "missing",
    }


@pytest.mark.slow
def test_a_schedule_moves_the_losses_and_leaves_the_baseline_alone(tmp_path: Path) -> None:
    moving = "loss.schedules={alpha: {kind: linear, start: 0.1, end: 0.5}}"
    given = ("--data", rows_file(tmp_path), "--seeds", 1, "--set", moving)
    folder = tmp_path / "c"
    losses = ("--loss", "skew_forward_kl_chunked", "--loss", "reverse_kl_chunked")
    line = refused("compare-losses", *QUICK, *given, *losses, "--output", folder)
    assert line.startswith("loss 'reverse_kl_chunked': schedules: no loss has a parameter")
    assert not folder.exists()
    compare(*given, *losses[:2], "--output", folder)
    found = records(folder)
    assert {record["status"] for record in found.values()} == {"done"}
    schedules = {
        record["trial"]["arm"]["loss"]: yaml.safe_load(
            (folder / "trials" / name / "config.yaml").read_text(encoding="utf-8")
        )["loss"]["schedules"]
        for name, record in found.items()
    }
    assert schedules[None] == {}
    assert schedules["skew_forward_kl_chunked"]["alpha"]["end"] == 0.5


def test_a_file_has_a_say_wherever_no_option_has(tmp_path: Path) -> None:
    file = tmp_path / "shared.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "loss": {"spec": "reverse_kl_chunked", "kd_ratio": 0.3},
                "optimizer": {"lr": 2e-3},
                "training": {"max_steps": 7, "seed": 0},
                "data": {"part": "all"},
                "output": {"dir": str(tmp_path / "there")},
            }
        ),
        encoding="utf-8",
    )
    plain = options(rows_file(tmp_path), losses=(), overrides=())
    usual, ours = comparison_of(plain), comparison_of(replace(plain, config=file))
    assert usual.base.training.max_steps == 400
    assert len(usual.plan.axes.losses) == 3
    assert ours.base.training.max_steps == 7
    axes = ours.plan.axes
    assert (axes.losses, axes.kd_ratios, axes.lrs) == (("reverse_kl_chunked",), (0.3,), (2e-3,))
    given = comparison_of(
        replace(plain, config=file, losses=("hellinger",), overrides=(("training.max_steps", 9),))
    )
    epochs = comparison_of(replace(plain, overrides=(("training.num_epochs", 1.0),)))
    assert epochs.base.training.max_steps is None
    assert given.plan.axes.losses == ("hellinger",)
    assert given.base.training.max_steps == 9
    kdrun("compare-losses", "--config", file, "--dry-run", "--seeds", 1)
    assert not (tmp_path / "there").exists()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").touch()
    line = refused("compare-losses", "--config", file, "--seeds", 1)
    assert f"--output {tmp_path / 'there'} is not empty and contains no comparison" in line


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        (
            "training",
            "seed",
            3,
            "training.seed=3: trials of a comparison vary this key; use --seeds instead",
        ),
        ("data", "part", "test", "data.part=test: trials of a comparison vary this key; remove it"),
        (
            *("loss", "schedules", {"kd_ratio": {"kind": "linear", "start": 0.1, "end": 0.5}}),
            "loss.schedules: a schedule of kd_ratio would replace",
        ),
    ],
)
def test_what_a_file_cannot_say_of_trials_is_refused(
    tmp_path: Path, section: str, key: str, value: object, message: str
) -> None:
    file = tmp_path / "shared.yaml"
    file.write_text(yaml.safe_dump({section: {key: value}}), encoding="utf-8")
    assert message in refused("compare-losses", "--config", file, "--dry-run")


@pytest.mark.parametrize("package", ["scipy", "matplotlib", "jinja2"])
def test_without_the_extra_nothing_begins(
    tmp_path: Path,
    given: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    package: str,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for more in ((), ("--dry-run",)):
        assert refused("compare-losses", *QUICK, *given, *more) == (
            f"comparisons need {package}, which is not installed: pip install 'kdlosses[compare]'"
        )
    assert not (tmp_path / "c").exists()


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
        (("--difference", "inf"), "must be above 0 and finite"),
        (("--lr", "inf"), "must be above 0 and finite"),
        (("--kd-ratio", "0"), "the baseline at 0 is always included"),
        (("--teacher", "none"), "a comparison needs a teacher"),
        (("--set", "loss.spec=reverse_kl"), "use --loss instead"),
        (("--set", "procedure.spec=gkd"), "use --procedure instead"),
        (("--set", "training.seed=3"), "use --seeds instead"),
        (("--set", "data.part=test"), "data.part: trials of a comparison vary this key; remove it"),
        (
            ("--set", "loss.schedules={kd_ratio: {kind: linear, start: 0.1, end: 0.5}}"),
            "use --kd-ratio instead",
        ),
        (("--yardstick", "rouge_l", "--set", "evaluation.answers=0"), "answers is 0; raise it"),
        (("--yardstick", "exact_match"), "needs evaluation.answer_pattern"),
        (("--yardstick", "rouge_l", "--data", "builtin"), "are plain text without prompts"),
        (("--max-length", "100000"), "limited to 1024 tokens"),
        (("--no-teacher-cache", "--set", "model.teacher_cache=c"), "remove one of them"),
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
    assert "needs the teacher's full distribution" in line
    shorter = (*QUICK, "--max-length", "24", *given, *named, *losses[:2])
    assert "lacks the row" in refused("compare-losses", *shorter)
    two = options(Path(rows), teachers=("builtin", "other"))
    overrides = (*two.overrides, ("model.teacher_cache", str(cache)))
    with pytest.raises(InputError, match="contains one teacher"):
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
    assert "one pass of each teacher over all rows" in printed
    assert not (tmp_path / "c").exists()
