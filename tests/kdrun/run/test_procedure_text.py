"""Plain text for procedures: ``procedure.text``."""

from __future__ import annotations

from pathlib import Path

from words import make_tokenizer

from kdrun.data.encoder import Encoder
from kdrun.run.procedure import read_text


def test_texts_with_tokens_that_only_one_model_knows_are_skipped(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(added=["<think>"])
    added = tokenizer.convert_tokens_to_ids("<think>")
    file = tmp_path / "text.jsonl"
    file.write_text(
        '{"text": "the cat sat on the mat"}\n{"text": "the <think> dog sat"}\n', encoding="utf-8"
    )
    windows, notes = read_text(str(file), Encoder(tokenizer, 4, left_out={"<think>": added}))
    seen = {token for window in windows for token in window["input_ids"]}
    assert added not in seen
    assert notes == [
        "procedure.text: 1 documents, 1 windows of 4 tokens",
        f"procedure.text: {file}: skipped 1 of 2 rows: line 2: has the token '<think>', which only "
        "one of the models knows",
    ]
