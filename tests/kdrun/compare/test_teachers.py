"""Trials that read a cache of their teacher: the same measures, one pass, resumed, moved, full."""

from __future__ import annotations

import dataclasses
import io
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console
from small import QUICK, compare, options, records, refused, rows_file, text_file

from kdrun.cache.manifest import MANIFEST, PLAN
from kdrun.cache.read import Cache
from kdrun.cache.teacher import CachedTeacher
from kdrun.cache.write import ShardWriter, StoredRow
from kdrun.compare.command import comparison_of
from kdrun.compare.declare import declare
from kdrun.compare.ledger import Ledger
from kdrun.compare.run import Comparison
from kdrun.compare.teachers import cache_teachers
from kdrun.data.encoder import Encoder
from kdrun.data.prepare import encode_rows, examples_in, read_rows
from kdrun.errors import InputError
from kdrun.models.pairs import find_pair

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
    assert "teacher cache" not in printed
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
    assert "building what is missing" in printed
    assert len(records(folder)) == 4


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


def prepare(comparison: Comparison, folder: Path) -> tuple[dict[tuple[str, str], Path], str]:
    """The caches of a comparison none of whose trials has run, and what was printed."""
    declare(comparison, Ledger(folder))
    return build(comparison, folder)


def build(comparison: Comparison, folder: Path) -> tuple[dict[tuple[str, str], Path], str]:
    """Likewise, of a comparison that is declared."""
    stream = io.StringIO()
    console = Console(file=stream, soft_wrap=True)
    found = cache_teachers(comparison, Ledger(folder), comparison.plan.open([]), console)
    return dict(found), stream.getvalue()


def test_the_rows_that_tuning_and_final_trials_are_measured_on_are_in_it(tmp_path: Path) -> None:
    comparison = comparison_of(options(text_file(tmp_path), lrs=(1e-3, 1e-2)))
    found, _ = prepare(comparison, tmp_path / "c")
    folder = found["builtin", "builtin"]
    assert folder == only_cache(tmp_path / "c")
    tokenizer = find_pair(comparison.base.model).tokenizer
    teacher = CachedTeacher(Cache(folder), tokenizer)
    for part, served in (("validation", True), ("test", True), ("all", False)):
        rows = read_rows(comparison.base.data.model_copy(update={"part": part}))
        examples = encode_rows(rows, Encoder(tokenizer, 32), seed=5, shift_windows=False)
        assert teacher.missing(examples_in(examples.train)) is None
        # The windows of all held-out text are others than those of its halves.
        assert (teacher.missing(examples_in(examples.held_out)) is None) == served


def test_without_room_for_a_cache_the_teacher_runs_in_every_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A real small disk needs root; the module that asks for the free space is told another figure.
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**30))
    found, printed = prepare(comparison_of(options(rows_file(tmp_path))), tmp_path / "c")
    assert found == {}
    assert "no teacher cache of builtin: it needs " in printed
    assert "1074 MB are free, and 1074 MB are reserved for the trials; every trial runs" in printed
    assert not list((tmp_path / "c" / "teacher-cache").iterdir())


def test_moving_windows_run_the_teacher_in_every_trial(tmp_path: Path) -> None:
    given = options(text_file(tmp_path))
    moving = (*given.overrides, ("data.shift_windows", True))
    comparison = comparison_of(dataclasses.replace(given, overrides=moving))
    found, printed = prepare(comparison, tmp_path / "c")
    assert found == {}
    assert "no teacher cache, because data.shift_windows=true" in printed


def test_processes_that_start_together_build_one_cache(tmp_path: Path) -> None:
    # Threads, since locks of files that are opened twice exclude each other within a process too.
    comparison = comparison_of(options(rows_file(tmp_path)))
    # Imports what two threads must not race for, and loads models, which only one may do at a time.
    declare(comparison, Ledger(tmp_path / "c"))
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(build, comparison, tmp_path / "c") for _ in range(2)]
        printed = [done.result()[1] for done in both]
    assert sorted("row 60/60" in text for text in printed) == [False, True]
    assert all("every trial of builtin reads it" in text for text in printed)
    # What a killed build leaves: shards, a file amid being written, and no manifest.
    folder = only_cache(tmp_path / "c")
    (folder / MANIFEST).unlink()
    (folder / ".rows-00002.safetensors.partial").write_bytes(b"half")
    _, again = build(comparison, tmp_path / "c")
    assert "is incomplete (it has no manifest.json); building what is missing" in again
    assert "60 of 60 rows are there already; going on" in again
    assert "row " not in again  # the teacher does not run
    assert not (folder / ".rows-00002.safetensors.partial").exists()


def test_an_interrupted_build_goes_on_and_one_of_another_teacher_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = comparison_of(options(rows_file(tmp_path)))
    ordinary = ShardWriter.add

    def stop(self: ShardWriter, first: int, rows: Sequence[StoredRow]) -> None:
        ordinary(self, first, rows)
        if first >= 16:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(comparison, tmp_path / "c")
    folder = only_cache(tmp_path / "c")
    assert not (folder / MANIFEST).exists()
    copy = shutil.copytree(folder, tmp_path / "copy")
    found, printed = build(comparison, tmp_path / "c")
    there = 16 + comparison.base.training.batch_size
    assert f"{there} of 60 rows are there already; going on" in printed
    assert Cache(found["builtin", "builtin"]).manifest.rows == 60
    shutil.rmtree(folder)
    shutil.copytree(copy, folder)
    plan = folder / PLAN
    plan.write_text(plan.read_text("utf-8").replace('"batch_size": ', '"batch_size": 1'), "utf-8")
    with pytest.raises(InputError, match="--batch-size differs"):
        build(comparison, tmp_path / "c")
    assert len(list(folder.iterdir())) == len(list(copy.iterdir()))
