"""Damaged and hostile input: one clear line, no traceback, no hang, and no memory beyond reason.

Inputs are made by hypothesis from right ones, which it cuts, joins, and sprinkles with bytes; those
that once failed are kept in ``corpus`` and tried first. More of it by hand:

    HYPOTHESIS_PROFILE=hour pytest tests/faults/test_fuzz.py
"""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kdlosses import BrokenLossError, LossSpecError, get_loss, parse_spec
from kdrun.cache.manifest import read_manifest
from kdrun.cache.resume import read_plan
from kdrun.compare.ledger import Ledger
from kdrun.config.load import load_config, parse_value
from kdrun.data.rows import load_rows
from kdrun.errors import InputError
from kdrun.models.gguf_header import context_length
from kdrun.models.locate import locate_model
from kdrun.procedures.registry import get_procedure
from kdrun.run.record import Record
from kdrun.training.checkpoint import find_checkpoint
from kdrun.training.progress import MetricsFile

with suppress(ImportError):  # its import must not count as memory of a reader
    import pyarrow.parquet  # noqa: F401

CORPUS = Path(__file__).with_name("corpus")
KNOWN = (InputError, LossSpecError, BrokenLossError)
EXAMPLES = 30000 if os.environ.get("HYPOTHESIS_PROFILE") == "hour" else 60
_ROOM = 2**22  # bytes that any reader may take, whatever its input

fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def survives(read: Callable[[], Any], size: int) -> None:
    """A reader returns or raises what the command line turns into one line."""
    said = ""
    with suppress(*KNOWN):
        read()  # what is imported and kept once is no memory of the input
    tracemalloc.start()
    try:
        read()
    except KNOWN as error:
        said = str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert "\n" not in said.strip()
    assert peak <= _ROOM + 10 * size


def damaged(seed: bytes) -> st.SearchStrategy[bytes]:
    """A right input with parts cut out, doubled, or replaced."""

    def damage(parts: tuple[int, int, bytes, int]) -> bytes:
        start, length, put, times = parts
        start %= len(seed) + 1
        return seed[:start] + put * times + seed[start + length :]

    ints = st.integers(0, len(seed))
    return st.tuples(ints, st.integers(0, 40), st.binary(max_size=8), st.integers(0, 3)).map(damage)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    [
        *("prompt", "response", "messages", "conversations", "role", "content", "from", "value"),
        *("text", "instruction", "input", "output", "instances", "history", "system", "weight"),
    ]
)
ROWS = st.lists(st.dictionaries(FIELDS, JSON_VALUES, max_size=5), max_size=4)
RIGHT_ROWS = b'{"prompt": "a", "response": "b"}\n{"messages": [{"role": "user", "content": "c"}]}\n'


@fuzzed
@given(st.one_of(damaged(RIGHT_ROWS), damaged(b"prompt,response\na,b\n"), st.binary(max_size=200)))
@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.csv", "rows.txt", "rows.parquet", "rows.json"]
)
def test_files_of_rows(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    survives(lambda: load_rows(path), len(content))


@fuzzed
@given(ROWS)
def test_rows_of_any_shape(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "rows.jsonl"
    content = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(content, encoding="utf-8")
    survives(lambda: load_rows(path), len(content))


@fuzzed
@given(
    damaged(
        b"loss:\n  spec: forward_kl\n  schedules: {kd_ratio: {kind: linear, start: 0, end: 1}}\n"
    )
)
def test_configurations(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    survives(lambda: load_config(path), len(content))


@fuzzed
@given(
    st.sampled_from(["loss.schedules", "optimizer.betas", "data.date", "lora.target_modules"]),
    st.text(max_size=40),
)
def test_values_of_the_command_line(key: str, text: str) -> None:
    survives(lambda: load_config(None, [(key, parse_value(key, text))]), len(text))


@fuzzed
@given(st.text(alphabet="abj_klsd:=,.0123456789+*eE- ForwadKL\n\0é", max_size=40))
@example("generalized_jsd:beta=nan")
@example("1e999*forward_kl")
@example("renyi:alpha=1e400")
def test_specs(text: str) -> None:
    survives(lambda: parse_spec(text), len(text))
    survives(lambda: get_loss(text), len(text) + 2**24)
    survives(lambda: get_procedure(text), len(text) + 2**24)


MANIFEST = {
    "format": 1, "kind": "top_k", "teacher_name": "t", "dtype": "float32", "vocab_size": 9,
    "teacher": {"config": "a", "head": "b", "parameters": "c"}, "entries": 2, "max_length": 8,
    "tokenizer": {"vocabulary": "a", "chat_template": "b"}, "rows": 1, "tokens": 1,
    "shards": [{"name": "rows-00001.safetensors", "bytes": 3, "rows": 1}],
}  # fmt: skip


@fuzzed
@given(damaged(json.dumps(MANIFEST).encode()))
def test_manifests_of_caches(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    (tmp_path / "rows-00001.safetensors").write_bytes(b"abc")
    survives(lambda: read_manifest(tmp_path), len(content))


PLAN = {name: MANIFEST[name] for name in MANIFEST if name != "shards"}
PLAN |= {"batch_size": 2, "keys": "a"}


@fuzzed
@given(damaged(json.dumps(PLAN).encode()))
def test_plans_of_caches(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    survives(lambda: read_plan(tmp_path), len(content))


@pytest.mark.parametrize("name", ["../rows.safetensors", "/etc/passwd", "a/b", "..", ".hidden"])
def test_a_manifest_names_no_file_outside_its_folder(tmp_path: Path, name: str) -> None:
    shards = [{"name": name, "bytes": 3, "rows": 1}]
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST | {"shards": shards}), "utf-8")
    with pytest.raises(InputError, match="unreadable"):
        read_manifest(tmp_path)


def comparison(folder: Path) -> Ledger:
    """An empty comparison."""
    for old in (folder / "comparison").rglob("*"):
        if old.is_file():
            old.unlink()
    return Ledger(folder / "comparison")


@fuzzed
@given(st.one_of(damaged(b'{"id": "a-1", "trial": {"arm": {"lr": 1}}}'), st.binary(max_size=60)))
def test_records_of_comparisons(tmp_path: Path, content: bytes) -> None:
    ledger = comparison(tmp_path)
    (ledger.folder / "records" / "a-1.json").write_bytes(content)
    survives(ledger.records, len(content))


@fuzzed
@given(damaged(yaml.safe_dump({"axes": {}, "yardstick": "ce", "difference": 1}).encode()))
def test_settings_of_comparisons(tmp_path: Path, content: bytes) -> None:
    from kdrun.compare.declare import read_declaration

    ledger = comparison(tmp_path)
    (ledger.folder / "comparison.yaml").write_bytes(content)
    survives(lambda: read_declaration(ledger), len(content))


RIGHT_MARK = json.dumps({"files": {"model.safetensors": {"bytes": 3, "sha256": "0" * 64}}}).encode()


@fuzzed
@given(damaged(RIGHT_MARK))
@example(b"\n")
@example(b"null")
@example(b'{"files": {"../../secret": {"bytes": 1, "sha256": ""}}}')
@example(b'{"files": {"model.safetensors": 3}}')
@example(b'{"files": [1]}')
def test_marks_of_checkpoints(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "checkpoint-4"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"abc")
    (folder / "complete").write_bytes(content)
    survives(lambda: find_checkpoint(tmp_path), len(content))


@fuzzed
@given(st.one_of(damaged(b'{"step": 1, "loss": 2}\n{"step": 2}\n'), st.binary(max_size=60)))
def test_lines_of_metrics(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    survives(lambda: MetricsFile(path, 2), len(content))


def header(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


RIGHT_HEADER = header(
    b'{"__metadata__": {"sources": "{}"}, "train": {"dtype": "I64", "shape": [1], '
    b'"data_offsets": [0, 8]}, "held_out": {"dtype": "I64", "shape": [0], "data_offsets": [8, 8]}}'
) + bytes(8)


@fuzzed
@given(damaged(RIGHT_HEADER))
def test_headers_of_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "inputs.safetensors").write_bytes(content)
    survives(lambda: Record.read(tmp_path), len(content))


GGUF = b"GGUF" + struct.pack("<IQQ", 3, 0, 2)
GGUF += struct.pack("<Q", 3) + b"key" + struct.pack("<IQ", 8, 2) + b"ab"
GGUF += struct.pack("<Q", 20) + b"llama.context_length" + struct.pack("<II", 4, 2048)


@fuzzed
@given(damaged(GGUF))
@example(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**62))
@example(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 0) + struct.pack("<IIQ", 9, 9, 2**62) * 50)
def test_headers_of_gguf_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    survives(lambda: context_length(path), len(content))
    survives(lambda: locate_model(path), len(content))


@fuzzed
@given(damaged(b'{"base_model_name_or_path": "../model", "peft_type": "LORA"}'))
def test_configurations_of_adapters(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content)
    survives(lambda: locate_model(tmp_path), len(content))


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*")), ids=lambda path: path.name)
def test_what_once_failed(tmp_path: Path, path: Path) -> None:
    content = path.read_bytes()
    copy = tmp_path / path.name.partition("-")[2]
    copy.write_bytes(content)
    survives(lambda: load_rows(copy), len(content))
