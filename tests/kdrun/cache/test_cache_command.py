"""``kdrun cache-teacher`` and ``kdrun --teacher-cache``."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import kdrun

KDRUN = Path(sys.executable).with_name("kdrun")
STILL = ("--set", "data.shift_windows=false")
QUICK = (
    *("--max-steps", 4, "--batch-size", 4, "--set", "training.logging_steps=1"),
    *("--set", "loss.compiled=false"),
)


def done(*arguments: object) -> str:
    finished = kdrun(*arguments)
    assert finished.returncode == 0, finished.stderr
    return finished.stderr


def refused(*arguments: object) -> str:
    """Run a command that must end with exit code 2; return its last line."""
    finished = kdrun(*arguments)
    assert finished.returncode == 2, finished.stderr
    assert "Traceback" not in finished.stderr
    return finished.stderr.splitlines()[-1]


def log(run: Path) -> list[dict[str, float]]:
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little text for the built-in pair; the whole built-in text takes longer."""
    from kdrun.builtin.text import load_text

    file = tmp_path_factory.mktemp("data") / "topics.txt"
    kept = [" ".join(topic.split())[:4000] for topic in load_text().train[:20]]
    file.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {"prompt": f"What is statement {i}?", "response": f"It is number {i} of the list."}
        for i in range(60)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def cache(chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "hidden"
    printed = done("cache-teacher", "--data", chats, "--max-length", 64, "--output", folder)
    assert "60 different rows" in printed
    assert "MB on disk" in printed
    assert f"cache: {folder}" in printed
    return folder


def test_a_cached_run_logs_what_a_live_run_does(cache: Path, chats: Path, tmp_path: Path) -> None:
    shared = ("--data", chats, "--max-length", 64, *QUICK)
    done(*shared, "--output", tmp_path / "live")
    printed = done("--teacher-cache", cache, *shared, "--output", tmp_path / "cached")
    assert "hidden states of builtin" in printed
    live, cached = log(tmp_path / "live"), log(tmp_path / "cached")
    assert len(live) == len(cached)
    for ours, theirs in zip(live, cached, strict=True):
        for key in ("loss", "kd_loss", "eval_forward_kl", "eval_top1_agreement"):
            assert (key in ours) == (key in theirs)
            if key in ours:
                assert theirs[key] == pytest.approx(ours[key], rel=1e-5)
    done("--config", tmp_path / "cached" / "config.yaml", "--output", tmp_path / "again")


def test_windows_of_text_are_cached_where_they_stand_still(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    done("cache-teacher", "--data", text, "--output", folder)
    printed = done(
        "--teacher-cache", folder, "--data", text, *STILL, *QUICK, "--output", tmp_path / "r"
    )
    assert "also evaluated against it" in printed
    line = refused("--teacher-cache", folder, "--data", text, *QUICK, "--output", tmp_path / "s")
    assert "data.shift_windows=false" in line
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_the_built_in_pair_works_from_end_to_end(tmp_path: Path) -> None:
    done("cache-teacher", "--output", tmp_path / "c")
    done("--teacher-cache", tmp_path / "c", *STILL, *QUICK, "--output", tmp_path / "cached")
    done(*STILL, *QUICK, "--output", tmp_path / "live")
    live, cached = log(tmp_path / "live"), log(tmp_path / "cached")
    for ours, theirs in zip(live, cached, strict=True):
        for key in ("loss", "eval_forward_kl"):
            if key in ours:
                assert theirs[key] == pytest.approx(ours[key], rel=1e-5)


def test_edited_rows_and_another_length_are_refused(
    cache: Path, chats: Path, tmp_path: Path
) -> None:
    edited = tmp_path / "edited.jsonl"
    edited.write_text(
        chats.read_text(encoding="utf-8").replace("number 7 ", "number seven "), encoding="utf-8"
    )
    line = refused("--teacher-cache", cache, "--data", edited, "--output", tmp_path / "r")
    assert "What is statement 7" in line
    line = refused(
        "--teacher-cache", cache, "--data", chats, "--max-length", 26, "--output", tmp_path / "r"
    )
    assert "another --max-length" in line


def test_top_k_trains_and_measures_only_with_the_teacher_named(chats: Path, tmp_path: Path) -> None:
    folder, shared = tmp_path / "k", ("--data", chats, "--max-length", 64, *QUICK)
    printed = done(
        *("cache-teacher", "--data", chats, "--max-length", 64, "--kind", "top-k", "--k", 20),
        *("--temperature", 2, "--output", folder),
    )
    assert "the 20 stored tokens cover 0." in printed
    printed = done(
        "--teacher-cache", folder, "--temperature", 2, *shared, "--output", tmp_path / "a"
    )
    assert "measures that need it are null" in printed
    summary = json.loads((tmp_path / "a" / "summary.json").read_text(encoding="utf-8"))
    assert summary["after"]["eval_forward_kl"] is None
    assert summary["after"]["eval_ce"] > 0
    done(
        *("--teacher-cache", folder, "--teacher", "builtin", "--temperature", 2, *shared),
        *("--output", tmp_path / "b"),
    )
    named = json.loads((tmp_path / "b" / "summary.json").read_text(encoding="utf-8"))
    assert named["after"]["eval_forward_kl"] > 0
    assert named["after"]["eval_ce"] == pytest.approx(summary["after"]["eval_ce"], rel=1e-6)
    line = refused("--teacher-cache", folder, *shared, "--output", tmp_path / "c")
    assert "stored at temperature 2" in line


def test_options_that_nothing_would_read_are_refused(tmp_path: Path) -> None:
    assert "--kind top-k" in refused("cache-teacher", "--k", 3, "--output", tmp_path / "c")
    line = refused("cache-teacher", "--temperature", 2, "--output", tmp_path / "c")
    assert "every temperature" in line
    assert "no such cache" in refused("--teacher-cache", tmp_path / "no", *STILL)
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_a_killed_build_is_refused_and_built_again(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    with subprocess.Popen(
        [KDRUN, "cache-teacher", "--output", folder],
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("row "):
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    line = refused("--teacher-cache", folder, *STILL, "--output", tmp_path / "run")
    assert "is incomplete" in line
    done("cache-teacher", "--output", folder)
    done("--teacher-cache", folder, *STILL, *QUICK, "--output", tmp_path / "run")
