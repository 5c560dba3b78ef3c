"""``data.streaming``: rows read while training, in an order that follows from source and seed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from commands import kdrun_in_processes
from cut_runs import cut_back
from safetensors.torch import load_file

from kdrun.data.encoder import Encoder
from kdrun.data.rows import SourceOf
from kdrun.data.stream import StreamedRows
from kdrun.errors import InputError


@pytest.fixture
def streamed(tiny_pair: Any) -> dict[str, Any]:
    return {"data__streaming": True, "data__eval": str(tiny_pair.rows), "data__shuffle_buffer": 7}


def students(*folders: Path) -> list[bytes]:
    return [(folder / "student" / "model.safetensors").read_bytes() for folder in folders]


def stream(file: Path, tokenizer: Any, buffer: int, seed: int = 0) -> StreamedRows:
    return StreamedRows([SourceOf(str(file))], Encoder(tokenizer, 64), buffer, seed)


def numbers(found: StreamedRows, count: int) -> list[int]:
    """The lines of the first rows."""
    rows = list(islice(iter(found), count))
    return [int(found.name([row["row"]]).rpartition(" ")[2]) for row in rows]


def test_a_buffer_of_one_keeps_the_order_and_a_larger_one_loses_no_row(
    tiny_pair: Any, tiny_tokenizer: Any
) -> None:
    file = tiny_pair.rows
    assert numbers(stream(file, tiny_tokenizer, 1), 90) == [
        *range(1, 41),
        *range(1, 41),
        *range(1, 11),
    ]
    shuffled = numbers(stream(file, tiny_tokenizer, 10), 200)
    assert shuffled[:40] != list(range(1, 41))
    counts = [shuffled.count(line) for line in range(1, 41)]
    assert sum(counts) == 200
    assert min(counts) >= 4
    assert shuffled == numbers(stream(file, tiny_tokenizer, 10), 200)
    assert shuffled != numbers(stream(file, tiny_tokenizer, 10, seed=1), 200)


def test_a_run_resumes_bit_for_bit(
    distil: Callable[..., Path], streamed: dict[str, Any], tmp_path: Path
) -> None:
    given = streamed | {"training__max_steps": 14, "training__save_steps": 6}
    said: list[str] = []
    whole = distil(tmp_path / "whole", said, **given)
    assert any("training rows: streamed; the checks see the first 40" in line for line in said)
    cut = cut_back(whole, tmp_path / "cut")
    distil(cut, resume=True, **given)
    first, second = students(whole, cut)
    assert first == second


def test_compressed_rows_that_cannot_be_used_are_passed_over(
    distil: Callable[..., Path], streamed: dict[str, Any], tiny_pair: Any, tmp_path: Path
) -> None:
    import gzip

    rows = Path(tiny_pair.rows).read_text(encoding="utf-8").splitlines()
    rows[3:3] = [json.dumps({"prompt": "no answer", "response": ""})] * 3
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join(rows).encode()))
    given = streamed | {"data__train": str(file), "training__max_steps": 12}
    said: list[str] = []
    distil(tmp_path / "run", said, **given)
    assert any(re.match(r"training rows: [36] of the stream could not be used", x) for x in said)
    with pytest.raises(InputError, match=r"line 4: the row has the field 'response' empty"):
        distil(tmp_path / "strict", **given, data__strict=True)


def test_rows_behind_those_that_are_checked_first_are_refused_too(
    tiny_pair: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    content = Path(tiny_pair.rows).read_text(encoding="utf-8") * 26  # 1,040 rows
    file = tmp_path / "rows.jsonl"
    file.write_text(content + json.dumps({"prompt": "no answer", "response": ""}) + "\n")
    strict = StreamedRows([SourceOf(str(file))], Encoder(tiny_tokenizer, 64, strict=True), 1, 0)
    with pytest.raises(InputError, match="line 1041: the row has the field 'response' empty"):
        list(islice(iter(strict), 1041))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"data__eval": None}, "data.streaming=true holds out no rows"),
        ({"data__packing": True}, "data.streaming=true excludes data.packing"),
        ({"training__max_steps": None}, "data.streaming=true has no end: set --max-steps"),
        ({"procedure__spec": "gkd"}, "not supported with a procedure"),
        ({"data__train": "builtin"}, "the built-in text is not streamed"),
        ({"trainer__dataloader_num_workers": 2}, "reads in the training process"),
    ],
)
def test_what_needs_all_rows_is_refused(
    distil: Callable[..., Path],
    streamed: dict[str, Any],
    tmp_path: Path,
    change: dict[str, Any],
    line: str,
) -> None:
    with pytest.raises(InputError, match=line):
        distil(tmp_path / "run", **streamed | change)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_share_the_stream(
    tiny_pair: Any, still_student: Path, tmp_path: Path
) -> None:
    """Two processes of four rows take the rows that one process of eight takes."""
    common = [
        *("--teacher", tiny_pair.teacher, "--student", still_student, "--data", tiny_pair.rows),
        *("--eval-data", tiny_pair.rows, "--max-length", 128, "--max-steps", 6, "--lr", 1e-3),
        *("--set", "data.streaming=true", "--set", "data.shuffle_buffer=7"),
        *("--set", "loss.compiled=false"),
    ]
    for count, size in ((1, 8), (2, 4)):
        out = ("--batch-size", size, "--output", tmp_path / str(count))
        for done in kdrun_in_processes(count, *common, *out):
            assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / n / "student" / "model.safetensors") for n in "12")
    for name, weight in one.items():
        assert (two[name] - weight).abs().max() <= 1e-5, name
