"""What a source stands for: files, globs, folders, saved data sets, compressed or not, mixed."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from cut_runs import cut_back

from kdrun.cli import cli
from kdrun.config.data_section import DataConfig
from kdrun.config.load import load_config
from kdrun.data.mixture import Mixture
from kdrun.data.prepare import read_rows
from kdrun.data.rows import ChatRow, RowSet, SourceOf, load_rows, load_sources
from kdrun.errors import InputError


def pairs(count: int, word: str = "a") -> list[dict[str, str]]:
    return [{"prompt": f"{word} {i}", "response": f"answer {i}"} for i in range(count)]


def lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def prompts(found: RowSet) -> list[str]:
    return [row.messages[0].content for row in found.rows if isinstance(row, ChatRow)]


EXPECTED = [f"a {i}" for i in range(5)]


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", lambda data: pa.compress(data, "zstd", asbytes=True)),
        ("", gzip.compress),  # the name has no say
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_compressed_files(
    tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes], kind: str
) -> None:
    rows = pairs(5)
    content = {
        "jsonl": lines(rows),
        "json": json.dumps(rows).encode(),
        "csv": b"prompt,response\n" + b"".join(f"{r['prompt']},x\n".encode() for r in rows),
        "txt": b"one document\n\nanother\n",
    }[kind]
    file = tmp_path / f"rows.{kind}{suffix}"
    file.write_bytes(pack(content))
    found = load_rows(file)
    if kind == "txt":
        assert found.data_format == "text"
        assert len(found.rows) == 2
    else:
        assert prompts(found) == EXPECTED


def test_damaged_compression_names_file_and_line(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i * 7919 % 10007}", "response": f"{i * 104729}"} for i in range(30000)]
    file = tmp_path / "rows.jsonl.gz"
    packed = gzip.compress(lines(rows))
    file.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError) as told:
        load_rows(file)
    found = re.search(r"rows.jsonl.gz: its gzip data are damaged after line (\d+)", str(told.value))
    assert found is not None
    assert 9000 < int(found[1]) < 20000


def test_a_glob_and_a_folder(tmp_path: Path) -> None:
    for name, word in (("b", "b"), ("a", "a")):
        (tmp_path / f"part-{name}.jsonl").write_bytes(lines(pairs(2, word)))
    expected = ["a 0", "a 1", "b 0", "b 1"]
    assert prompts(load_rows(tmp_path / "part-*.jsonl")) == expected
    found = load_rows(tmp_path)
    assert prompts(found) == expected
    assert found.rows[2].position.file.endswith("part-b.jsonl")
    assert found.rows[2].position.number == 1
    with pytest.raises(InputError, match=r"no file has a name of this form; .*part-a.jsonl"):
        load_rows(tmp_path / "prt-*.jsonl")
    (tmp_path / "notes.txt").write_text("a note")
    with pytest.raises(InputError, match=r"files of several kinds \(.jsonl, .txt\)"):
        load_rows(tmp_path)


def test_tables_and_their_columns(tmp_path: Path) -> None:
    for number in range(2):
        table = pa.Table.from_pylist(pairs(2, "ab"[number]))
        pq.write_table(table, tmp_path / f"{number}.parquet")
    assert prompts(load_rows(tmp_path)) == ["a 0", "a 1", "b 0", "b 1"]
    pq.write_table(pa.table({"prompt": ["x"], "answer": ["y"]}), tmp_path / "2.parquet")
    with pytest.raises(InputError, match=r"2.parquet: its columns are not those of .*answer, resp"):
        load_rows(tmp_path)
    with pa.ipc.new_file(str(tmp_path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert prompts(load_rows(tmp_path / "rows.arrow")) == ["b 0", "b 1"]


def test_a_data_set_that_was_saved(tmp_path: Path) -> None:
    import datasets

    one = datasets.Dataset.from_list(pairs(5))
    one.save_to_disk(str(tmp_path / "one"))
    assert prompts(load_rows(tmp_path / "one")) == EXPECTED
    both = datasets.DatasetDict(train=one, test=datasets.Dataset.from_list(pairs(1, "t")))
    both.save_to_disk(str(tmp_path / "both"))
    assert prompts(load_rows(tmp_path / "both")) == EXPECTED
    assert prompts(load_rows(f"{tmp_path / 'both'}@test")) == ["t 0"]
    with pytest.raises(InputError, match=r"no split 'tset'; did you mean @test\?"):
        load_rows(f"{tmp_path / 'both'}@tset")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(InputError, match=r"not a data set that this version of datasets"):
        load_rows(tmp_path / "one")


def test_a_json_list_is_read_one_value_at_a_time(tmp_path: Path) -> None:
    """A long list takes no more memory than a short one."""
    import tracemalloc

    from kdrun.data.records import read_text_file
    from kdrun.data.streams import TextFile

    peaks = []
    for count in (2_000, 20_000):
        file = tmp_path / f"{count}.json"
        file.write_text(json.dumps(pairs(count), indent=1))
        tracemalloc.start()
        assert sum(1 for _ in read_text_file(TextFile(file, "x"), as_text=False)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ('[\n{"prompt": "a", "response": "b"}\n{"prompt": "c"}]', 3, "Expecting ','"),
        ('[{"prompt": "a", "response": "b"},\n]', 2, "Expecting value"),
        ('[{"prompt": "a", "response": "b"}]\n\n[]', 3, "Extra data"),
        ('[{"prompt": "a", "response": "b"},\n{"prompt": "', 2, "Unterminated string"),
        ('[{"prompt": "a", "response": "b"}', 1, "Expecting ','"),
    ],
)
def test_broken_lists_name_the_line_that_json_names(
    tmp_path: Path, text: str, line: int, what: str
) -> None:
    file = tmp_path / "rows.json"
    file.write_text(text)
    with pytest.raises(InputError, match=rf"rows.json, line {line}: broken JSON \({what}"):
        load_rows(file)


def test_several_sources_one_after_another(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(pairs(2, "a")))
    (tmp_path / "b.json").write_text(json.dumps([{"q": "b 0", "r": "x"}]))
    sources = [
        SourceOf(str(tmp_path / "a.jsonl")),
        SourceOf(str(tmp_path / "b.json"), prompt_field="q", response_field="r"),
    ]
    found = load_sources(sources)
    assert prompts(found) == ["a 0", "a 1", "b 0"]
    assert found.rows.sources().tolist() == [0, 0, 1]
    (tmp_path / "c.txt").write_text("plain text")
    with pytest.raises(InputError, match=r"c.txt is plain text and .*a.jsonl is not"):
        load_sources([*sources, SourceOf(str(tmp_path / "c.txt"))])


def test_a_run_on_two_files_given_on_the_command_line(tiny_pair: Any, tmp_path: Path) -> None:
    content = Path(tiny_pair.rows).read_text(encoding="utf-8").splitlines(keepends=True)
    for name, part in (("one", content[:20]), ("two", content[20:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    arguments = ["--teacher", str(tiny_pair.teacher), "--student", str(tiny_pair.student)]
    for name in ("one", "two"):
        arguments += ["--data", str(tmp_path / f"{name}.jsonl")]
    arguments += ["--max-steps", "1", "--set", "loss.compiled=false", "--max-length", "128"]
    done = CliRunner().invoke(cli, [*arguments, "--output", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    config = load_config(tmp_path / "run" / "config.yaml")
    assert config.data.train == tuple(str(tmp_path / f"{n}.jsonl") for n in ("one", "two"))
    assert len(read_rows(config.data).train) == 38


EXAMPLES: Any = [{"input_ids": [i], "labels": [i]} for i in range(1000)]


class TestMixture:
    def mixture(self, weights: tuple[float, ...] = (3.0, 1.0)) -> Mixture:
        import numpy as np

        groups = np.repeat([0, 1], [100, 900])
        return Mixture(EXAMPLES, groups, weights, seed=5)

    def ids(self, mixture: Mixture) -> list[int]:
        return [mixture[i]["input_ids"][0] for i in range(len(mixture))]

    def test_shares_are_those_of_the_weights(self) -> None:
        """750 of 1000 places are expected of the first; four standard deviations are 55."""
        found = self.ids(self.mixture())
        assert len(found) == 1000
        assert abs(sum(i < 100 for i in found) - 750) < 55

    def test_a_small_source_is_repeated_evenly_over_epochs(self) -> None:
        mixture, seen = self.mixture(), Counter[int]()
        for epoch in range(3):
            mixture.set_epoch(epoch)
            seen.update(i for i in self.ids(mixture) if i < 100)
        assert max(seen.values()) - min(seen.values()) <= 1
        assert len(seen) == 100

    def test_an_epoch_follows_from_seed_and_number_alone(self) -> None:
        first, second = self.mixture(), self.mixture()
        for epoch in range(3):
            first.set_epoch(epoch)
        second.set_epoch(2)
        assert self.ids(first) == self.ids(second)
        second.set_epoch(1)
        assert self.ids(first) != self.ids(second)

    def test_a_run_resumes_bit_for_bit(
        self, distil: Callable[..., Path], tiny_pair: Any, tmp_path: Path
    ) -> None:
        content = Path(tiny_pair.rows).read_text(encoding="utf-8").splitlines(keepends=True)
        sources = []
        for name, part, weight in (("one", content[:8], 1.0), ("two", content[8:], 2.0)):
            (tmp_path / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
            sources.append({"path": str(tmp_path / f"{name}.jsonl"), "weight": weight})
        given: dict[str, Any] = {
            "data__train": "builtin",
            "data__sources": sources,
            "data__eval": str(tiny_pair.rows),
            "training__save_steps": 6,
            "training__max_steps": 14,  # more than an epoch of ten steps
        }
        said: list[str] = []
        whole = distil(tmp_path / "whole", said, **given)
        assert any("one.jsonl: 33% of the training rows" in line for line in said)
        cut = cut_back(whole, tmp_path / "cut")
        distil(cut, resume=True, **given)
        files = [folder / "student" / "model.safetensors" for folder in (whole, cut)]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("sources", "line"),
    [
        ([{"path": "a", "weight": 0}], "weight"),
        ([{"path": "a", "weight": 1}, {"path": "b"}], "give all sources a weight, or none"),
        ([{"path": "a", "wieght": 1}], "wieght"),
    ],
)
def test_wrong_mixtures_are_one_line(sources: list[dict[str, Any]], line: str) -> None:
    with pytest.raises(InputError, match=line):
        load_config(None, [("data.sources", sources)])


def test_a_file_given_as_both_is_told(tiny_pair: Any) -> None:
    config = DataConfig(train=str(tiny_pair.rows), eval=str(tiny_pair.rows))
    (line,) = [x for x in read_rows(config).notes if "also training rows" in x]
    assert line.startswith("held-out rows: 40 of 40 are also training rows")
