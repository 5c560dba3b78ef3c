"""``kdrun cache-teacher`` and ``kdrun --teacher-cache``."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import kdrun, script_in_processes

from kdrun.cache.read import Cache

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


@pytest.fixture(scope="module")
def kinds(tiny_pair: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A cache of each kind that was built without interruption."""
    folder = tmp_path_factory.mktemp("kinds")
    for kind in ("hidden", "top-k", "sampled"):
        done(*build_of(tiny_pair, kind), "--output", folder / kind)
    return {kind: folder / kind for kind in ("hidden", "top-k", "sampled")}


def build_of(pair: Any, kind: str) -> tuple[object, ...]:
    given = ("cache-teacher", "--teacher", pair.teacher, "--data", pair.rows, "--kind", kind)
    return (*given, "--batch-size", 3, "--max-length", 128, "--set", "data.cache_dir=none")


def stop_build(pair: Any, kind: str, folder: Path, signum: int) -> tuple[int, str]:
    """The exit code and the output of a build that gets a signal after 12 rows."""
    script = str(Path(__file__).with_name("stopped_build.py"))
    arguments = (signum, 12, *build_of(pair, kind), "--output", folder)
    (stopped,) = script_in_processes(1, script, *arguments)
    return stopped.returncode, stopped.stderr


@pytest.mark.parametrize("kind", ["hidden", "top-k", "sampled"])
def test_a_killed_build_is_refused_and_continued_to_the_same_cache(
    tiny_pair: Any, kinds: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "c"
    assert stop_build(tiny_pair, kind, folder, signal.SIGKILL)[0] == -signal.SIGKILL
    assert not (folder / "manifest.json").exists()
    run = ("--student", tiny_pair.student, "--data", tiny_pair.rows, "--output", tmp_path / "run")
    assert "is incomplete" in refused("--teacher-cache", folder, *run)
    printed = done(*build_of(tiny_pair, kind), "--output", folder)
    assert "12 of 40 rows are there already; going on\n" in printed
    ours, theirs = Cache(folder), Cache(kinds[kind])
    assert ours.manifest.model_dump(exclude={"shards"}) == theirs.manifest.model_dump(
        exclude={"shards"}
    )
    for key in theirs._places:
        both = zip(ours.read(key), theirs.read(key), strict=True)
        assert all(torch.equal(one, other) for one, other in both)


def test_a_stopped_build_says_how_to_go_on_and_another_one_removes_nothing(
    tiny_pair: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "c"
    code, printed = stop_build(tiny_pair, "top-k", folder, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert printed.splitlines()[-1] == (
        f"kdrun: stopped by SIGTERM; the finished rows are kept in {folder}: give the same command "
        "again to go on"
    )
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(before) > 2
    given, output = build_of(tiny_pair, "top-k"), ("--output", folder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(tiny_pair.rows.read_text(encoding="utf-8").replace("3 the", "4 the"), "utf-8")
    for change, told in (
        (("--k", 20), "(--k, --draws) differs (50, now 20)"),
        (("--temperature", 2), "--temperature differs (1, now 2)"),
        (("--data", rows), "the content or order of the rows differs"),
        (("--teacher", tiny_pair.student, "--student", tiny_pair.student), "the teacher differs"),
    ):
        line = refused(*given, *change, *output)
        assert told in line
        assert f"choose another folder, or remove {folder} to start over" in line
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert "12 of 40 rows are there already" in done(*given, *output)


@pytest.mark.slow
def test_a_killed_build_of_the_built_in_pair_can_be_trained_with(tmp_path: Path) -> None:
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
