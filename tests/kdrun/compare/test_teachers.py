"""Trials that read a cache of their teacher: the same measures, one pass, resumed, moved, full."""

from __future__ import annotations

import io
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
import yaml
from rich.console import Console
from small import QUICK, compare, options, records, refused, rows_file, text_file

from kdrun.cache.manifest import MANIFEST
from kdrun.compare.command import comparison_of
from kdrun.compare.declare import declare
from kdrun.compare.ledger import Ledger
from kdrun.compare.teachers import cache_teachers

for package in ("scipy", "matplotlib", "jinja2"):
    pytest.importorskip(package)

ONE = ("--loss", "forward_kl_chunked", "--seeds", "1")


def only_cache(folder: Path) -> Path:
    (found,) = (folder / "teacher-cache").iterdir()
    return found


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A comparison of text with a cache, and what it printed."""
    folder = tmp_path_factory.mktemp("cached")
    printed = compare("--data", text_file(folder), *ONE, "--output", folder / "c")
    return folder / "c", printed


def test_a_trial_with_the_cache_measures_what_one_without_does(
    cached: tuple[Path, str], tmp_path: Path
) -> None:
    folder, printed = cached
    assert "data.shift_windows=false: plain text is cut at the same places" in printed
    assert f"teacher cache: {only_cache(folder)}, " in printed
    data = folder.parent / "text.txt"
    live = ("--no-teacher-cache", "--set", "data.shift_windows=false")
    printed = compare("--data", data, *ONE, *live, "--output", tmp_path / "c")
    assert "cache" not in printed
    # Live or cached makes no difference to what a trial is, so both have the same names.
    ours, theirs = records(folder), records(tmp_path / "c")
    assert ours.keys() == theirs.keys()
    for name, record in ours.items():
        wanted = theirs[name]["measures"]
        assert record["measures"].keys() == wanted.keys()
        for measure, value in wanted.items():
            assert record["measures"][measure] == pytest.approx(value, abs=1e-5), measure
        config = yaml.safe_load((folder / "trials" / name / "config.yaml").read_text("utf-8"))
        assert config["model"]["teacher"] is None  # its weights were not even loaded
        assert config["model"]["teacher_cache"] == str(only_cache(folder))


def test_a_moved_folder_goes_on_with_its_cache_and_a_damaged_one_is_built_again(
    cached: tuple[Path, str], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(cached[0], tmp_path / "moved"))
    data = ("--data", cached[0].parent / "text.txt")
    manifest = only_cache(folder) / MANIFEST
    before = manifest.stat().st_mtime_ns
    printed = compare(*data, "--loss", "reverse_kl_chunked", "--seeds", 1, "--output", folder)
    assert "row " not in printed  # the teacher did not run
    assert manifest.stat().st_mtime_ns == before
    assert len(records(folder)) == 3
    # As a copy that was broken off leaves it.
    shard = next(only_cache(folder).glob("rows-*"))
    shard.write_bytes(shard.read_bytes()[:-9])
    printed = compare(*data, "--loss", "hellinger_chunked", "--seeds", 1, "--output", folder)
    assert "is truncated" in printed
    assert "it is built again" in printed
    assert len(records(folder)) == 4
    # Nothing is left to run: no cache is looked for.
    shutil.rmtree(folder / "teacher-cache")
    compare(*data, "--loss", "hellinger_chunked", "--seeds", 1, "--output", folder)
    assert not (folder / "teacher-cache").exists()


def test_edited_rows_are_refused(cached: tuple[Path, str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(cached[0], tmp_path / "c"))
    data = cached[0].parent / "text.txt"
    whole = data.read_text(encoding="utf-8")
    try:
        data.write_text(whole.replace("Document 7 ", "Document seven "), encoding="utf-8")
        line = refused(
            *("compare-losses", *QUICK, "--data", data, "--loss", "forward_kl_chunked"),
            *("--seeds", 2, "--output", folder),
        )
    finally:
        data.write_text(whole, encoding="utf-8")
    assert f"data.train={data} or the held-out rows were edited" in line


def test_tuning_and_final_trials_are_measured_against_the_teacher_too(tmp_path: Path) -> None:
    data = rows_file(tmp_path)
    compare(
        *("--data", data, "--loss", "forward_kl_chunked", "--lr", 1e-3, "--lr", 1e-2),
        *("--seeds", 1, "--tuning-seeds", 1, "--output", tmp_path / "c"),
    )
    only_cache(tmp_path / "c")
    found = records(tmp_path / "c").values()
    assert {record["trial"]["stage"] for record in found} == {"tuning", "final"}
    assert all(record["measures"]["forward_kl"] > 0 for record in found)


def test_without_room_for_a_cache_the_teacher_runs_in_every_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A real small disk needs root; the module that asks for the free space is told another figure.
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**30))
    printed = compare("--data", rows_file(tmp_path), *ONE, "--output", tmp_path / "c")
    assert "no teacher cache of builtin: it needs " in printed
    assert "1074 MB are free, and 1074 MB are kept for the trials; every trial runs it" in printed
    assert not list((tmp_path / "c" / "teacher-cache").iterdir())
    assert all(r["measures"]["forward_kl"] > 0 for r in records(tmp_path / "c").values())


def test_moving_windows_run_the_teacher_in_every_trial(tmp_path: Path) -> None:
    moving = ("--set", "data.shift_windows=true")
    printed = compare("--data", text_file(tmp_path), *ONE, *moving, "--output", tmp_path / "c")
    assert "no teacher cache: data.shift_windows=true" in printed
    assert not (tmp_path / "c" / "teacher-cache").exists()


def test_processes_that_start_together_build_one_cache(tmp_path: Path) -> None:
    # Threads, since locks of files that are opened twice exclude each other within a process too.
    comparison = comparison_of(options(rows_file(tmp_path)))
    assert transformers.AutoTokenizer  # whose lazy import two threads must not race for
    declare(comparison, Ledger(tmp_path / "c"))
    printed: list[str] = []

    def prepare() -> None:
        console = Console(file=io.StringIO(), soft_wrap=True)
        ledger = Ledger(tmp_path / "c")
        found = cache_teachers(comparison, ledger, comparison.plan.open([]), console)
        assert list(found.values()) == [only_cache(tmp_path / "c")]
        assert isinstance(console.file, io.StringIO)
        printed.append(console.file.getvalue())

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(prepare), pool.submit(prepare)]:
            done.result()
    assert sorted("row 60/60" in text for text in printed) == [False, True]
    assert all("every trial of builtin reads it" in text for text in printed)
    # What a killed build leaves: shards, a file amid being written, and no manifest.
    folder = only_cache(tmp_path / "c")
    (folder / MANIFEST).unlink()
    (folder / ".rows-00002.safetensors.partial").write_bytes(b"half")
    prepare()
    assert "is incomplete (it has no manifest.json); it is built again" in printed[-1]
    assert "row 60/60" in printed[-1]
    assert not (folder / ".rows-00002.safetensors.partial").exists()
