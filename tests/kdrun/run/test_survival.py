"""Runs that are killed, or whose disk is full, go on as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from commands import kdrun

from kdrun.cli import cli
from kdrun.errors import InputError

pytestmark = pytest.mark.slow


def run(folder: Path, arguments: list[object], kill_after: int | None = None) -> Any:
    cache = str(folder / "cache")
    return kdrun(*arguments, kill_after=kill_after, XDG_CACHE_HOME=cache)


def run_of(pair: Any, folder: Path, *more: object) -> list[object]:
    """Ten steps with dropout, shuffled rows and accumulation; step 4 lies amid the first epoch."""
    return [
        *("--teacher", pair.teacher, "--student", pair.student, "--data", pair.rows),
        *("--max-length", 128, "--max-steps", 10, "--batch-size", 3, "--lr", "1e-2"),
        *("--set", "training.gradient_accumulation_steps=2", "--set", "training.save_steps=4"),
        *("--set", "training.logging_steps=1", "--set", "loss.compiled=false"),
        *("--output", folder, *more),
    ]


VARIANTS: dict[str, tuple[object, ...]] = {
    "full": ("--loss", "taid_chunked"),
    "lora": ("--loss", "forward_kl_chunked", "--lora-rank", 4, "--set", "lora.dropout=0.1"),
}


def lines(folder: Path) -> list[dict[str, Any]]:
    """What was logged, without what depends on the clock."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.splitlines()]
    timed = ("second", "runtime")
    return [{k: v for k, v in x.items() if not any(t in k for t in timed)} for x in found]


def test_ten_steps_equal_six_steps_kill_9_and_a_resume_from_step_four(
    tiny_pair: Any, tmp_path: Path
) -> None:
    for name, more in VARIANTS.items():
        whole, killed = tmp_path / f"{name}-whole", tmp_path / f"{name}-killed"
        done = [
            run(tmp_path, run_of(tiny_pair, whole, *more)),
            run(tmp_path, run_of(tiny_pair, killed, *more), kill_after=6),
            run(tmp_path, ["--resume", "--output", killed]),
        ]
        assert [one.returncode for one in done] == [0, -9, 0], done
    for name, weights in (("full", "model"), ("lora", "adapter_model")):
        whole, killed = tmp_path / f"{name}-whole", tmp_path / f"{name}-killed"
        file = f"{weights}.safetensors"
        assert (whole / "student" / file).read_bytes() == (killed / "student" / file).read_bytes()
        assert lines(whole) == lines(killed)
        assert [line["step"] for line in lines(whole) if "loss" in line] == list(range(1, 11))
    states = [
        json.loads((path / "objective.json").read_text(encoding="utf-8"))["objective"]
        for path in (tmp_path / "full-whole" / "checkpoints").glob("checkpoint-*")
    ]
    assert states[0] != states[1]  # the loss did carry a state


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[None]:
    """A file system in memory that is soon full."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_ends_with_one_line_and_keeps_the_last_complete_checkpoint(
    tiny_pair: Any, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    more = ("--set", "training.save_steps=2", "--set", "training.save_total_limit=9")
    with small_disk(disk, "1m"):
        found = run(tmp_path, run_of(tiny_pair, disk / "run", *more))
        assert found.returncode == 1, found
        assert "Traceback" not in found.stderr
        last = found.stderr.splitlines()[-1]
        kept = sorted(
            int(path.parent.name.rpartition("-")[2])
            for path in (disk / "run" / "checkpoints").glob("checkpoint-*/complete")
        )
        assert kept, "room for one checkpoint at least"
        assert kept[-1] < 10, "not room for all"
        assert "cannot be written" in last
        assert f"checkpoint-{kept[-1]} is complete" in last
        assert f"--resume --output {disk / 'run'}" in last
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        resumed = run(tmp_path, ["--resume", "--output", disk / "run"])
        assert resumed.returncode == 0, resumed
        assert f"checkpoint-{kept[-1] + 2} is incomplete and skipped" in resumed.stderr
        steps = [line["step"] for line in lines(disk / "run") if "loss" in line]
        assert steps == list(range(1, 11))


def test_a_folder_on_a_disk_that_is_only_read_is_refused(tiny_pair: Any, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    arguments = [str(word) for word in run_of(tiny_pair, disk / "run")]
    with small_disk(disk, "1m"):
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(InputError, match=f"{disk / 'run'}.*writable folder"):
            CliRunner().invoke(cli, arguments, catch_exceptions=False)
