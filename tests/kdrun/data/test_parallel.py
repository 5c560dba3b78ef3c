"""Rows tokenised by several processes: the same store, in order, and errors in one line."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kdrun.data.encoder as encoder_module
from kdrun.data.encoder import Encoder
from kdrun.data.parallel import run_in_order
from kdrun.data.rows import load_rows
from kdrun.data.token_cache import TokenCache
from kdrun.errors import InputError


def slow_when_even(shared: int, job: int) -> tuple[int, int]:
    time.sleep(0.02 * (job % 2 == 0))
    return shared + job, os.getpid()


def killed(shared: int, job: int) -> int:
    if job == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return job


def refuses(shared: int, job: int) -> int:
    raise InputError(f"row {job}: cannot be used")


def endless(drawn: list[int]) -> Iterator[int]:
    for number in range(1000):
        drawn.append(number)
        yield number


def test_results_are_in_the_order_of_the_jobs_and_few_wait() -> None:
    drawn: list[int] = []
    found = run_in_order(slow_when_even, 100, endless(drawn), 2)
    results = [next(found) for _ in range(20)]
    assert [value for value, _ in results] == list(range(100, 120))
    assert len({process for _, process in results}) == 2
    assert os.getpid() not in {process for _, process in results}
    assert len(drawn) < 30
    found.close()  # type: ignore[attr-defined]


def test_a_worker_that_is_killed_is_one_line() -> None:
    with pytest.raises(InputError, match=r"data.workers=2 was ended by the system"):
        list(run_in_order(killed, 0, range(10), 2))


def test_an_error_in_a_worker_is_that_of_the_row() -> None:
    with pytest.raises(InputError, match="row 0: cannot be used"):
        list(run_in_order(refuses, 0, range(10), 2))


@pytest.fixture
def rows(tmp_path: Path) -> Any:
    file = tmp_path / "rows.jsonl"
    with open(file, "w", encoding="utf-8") as stream:
        for number in range(3500):
            answer = "an answer " * (number % 40)
            stream.write(json.dumps({"prompt": f"a question {number}", "response": answer}) + "\n")
    return load_rows(file).rows


def test_two_workers_write_what_one_writes(
    rows: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_module, "_ROWS_FOR_A_WORKER", 1000)
    files = []
    for workers in (1, 2):
        cache = TokenCache(tmp_path / str(workers))
        encoder = Encoder(tiny_tokenizer, 64, cache=cache, workers=workers)
        tokens = encoder.chats(rows, "training")
        assert tokens.encoding().cut
        (store,) = (tmp_path / str(workers)).iterdir()
        files.append({file.name: file.read_bytes() for file in store.iterdir()})
    assert files[0] == files[1]


def test_progress_is_shown(
    rows: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(encoder_module, "_ROWS_FOR_A_WORKER", 1000)
    Encoder(tiny_tokenizer, 64, workers=2).chats(rows, "training")
    said = capsys.readouterr().err
    assert "training rows 3412/3412" in said
    assert "rows/s" in said


def test_a_disk_that_fills_leaves_nothing_that_could_be_taken_for_whole(
    rows: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from kdrun.data import arrow_store

    class Full:
        def __init__(self, writer: Any) -> None:
            self._writer, self._left = writer, 2

        def write_batch(self, batch: Any) -> None:
            self._left -= 1
            if self._left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._writer.write_batch(batch)

    begin = arrow_store.StoreWriter.__init__

    def full(self: Any, *given: Any) -> None:
        begin(self, *given)
        self._writer = Full(self._writer)

    monkeypatch.setattr(arrow_store.StoreWriter, "__init__", full)
    with pytest.raises(InputError, match=r"No space left on device\); free some space"):
        Encoder(tiny_tokenizer, 64, cache=TokenCache(tmp_path / "c")).chats(rows)
    assert not list((tmp_path / "c").iterdir())
