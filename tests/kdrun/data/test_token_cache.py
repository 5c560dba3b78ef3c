"""Tokenised rows from an earlier run: the same as encoded anew, and never another's."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdrun.data.encode import encode
from kdrun.data.encoder import Encoder
from kdrun.data.encoding import Encoding
from kdrun.data.records import Position
from kdrun.data.rows import ChatRow, Message, TextRow
from kdrun.data.token_cache import TokenCache
from kdrun.data.windows import concatenate
from kdrun.errors import InputError


def chat(question: str, answer: str, number: int = 1, file: str = "a.jsonl") -> ChatRow:
    messages = (Message("user", question), Message("assistant", answer))
    return ChatRow(messages, Position(file, number))


def kept(
    cache: TokenCache, rows: list[ChatRow], tokenizer: Any, length: int, long: Any = "cut"
) -> Encoding:
    return Encoder(tokenizer, length, long, cache).chats(rows).encoding()


def plain(encoding: Encoding) -> Encoding:
    return replace(encoding, examples=list(encoding.examples))


ROWS = [
    chat("a question", "an answer"),
    chat("long" * 30, "no room", 2),
    chat("the user", "gives an answer " * 30, 3),
]


def other_ids(tokenizer: Any) -> Any:
    """A tokenizer of the same class and size, in which two tokens have changed places."""
    from tokenizers import Tokenizer

    changed = copy.deepcopy(tokenizer)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    one, other = tokenizer.convert_ids_to_tokens(tokenizer("an answer")["input_ids"])[:2]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    changed._tokenizer = Tokenizer.from_str(json.dumps(content))
    return changed


def other_template(tokenizer: Any) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = tokenizer.chat_template.replace("<|im_end|>", " <|im_end|>")
    return changed


def test_the_second_time_gives_what_the_first_gave_without_encoding(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = TokenCache(tmp_path / "tokens")
    expected = encode(ROWS, tiny_tokenizer, 64)
    assert expected.skipped
    assert expected.cut
    assert plain(kept(cache, ROWS, tiny_tokenizer, 64)) == expected
    assert len(list(cache.folder.iterdir())) == 1
    monkeypatch.setattr("kdrun.data.encoder.encode", None)
    moved = [chat(*(m.content for m in row.messages), 7, "b.jsonl") for row in ROWS]
    assert plain(kept(cache, moved, tiny_tokenizer, 64)) == expected


def test_d16_another_tokenizer_template_row_or_setting_is_encoded_anew(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    cache = TokenCache(tmp_path)
    variants: list[tuple[list[ChatRow], Any, int, Any]] = [
        (ROWS, tiny_tokenizer, 64, "cut"),
        (ROWS, other_ids(tiny_tokenizer), 64, "cut"),
        (ROWS, other_template(tiny_tokenizer), 64, "cut"),
        (ROWS, tiny_tokenizer, 65, "cut"),
        (ROWS, tiny_tokenizer, 64, "skip"),
        ([chat("a question", "another answer"), *ROWS[1:]], tiny_tokenizer, 64, "cut"),
        ([*ROWS[1:], ROWS[0]], tiny_tokenizer, 64, "cut"),
    ]
    found = []
    for _ in range(2):
        for variant in variants:
            found.append(plain(kept(cache, *variant)))
            assert found[-1] == encode(*variant)
    first = [json.dumps(encoding.examples) for encoding in found[: len(variants)]]
    assert [first.index(content) for content in first] == list(range(len(variants)))
    assert len(list(tmp_path.iterdir())) == len(variants)


def test_texts_are_kept_too(tiny_tokenizer: Any, tmp_path: Path) -> None:
    cache = TokenCache(tmp_path)
    texts = ["the user asks", "an answer"]
    rows = [TextRow(text, Position("a.txt", number)) for number, text in enumerate(texts)]
    for tokenizer in (tiny_tokenizer, other_ids(tiny_tokenizer)):
        for _ in range(2):
            found = Encoder(tokenizer, 64, cache=cache).texts(rows).flat()
            assert list(found[:]) == concatenate(texts, tokenizer)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damaged", ["table.arrow", "about.json"])
@pytest.mark.parametrize("damage", [b"", b"no such format", None])
def test_a_damaged_file_is_written_again(
    tiny_tokenizer: Any, tmp_path: Path, damage: bytes | None, damaged: str
) -> None:
    cache = TokenCache(tmp_path)
    expected = plain(kept(cache, ROWS, tiny_tokenizer, 64))
    (store,) = tmp_path.iterdir()
    file = store / damaged
    content = file.read_bytes()
    file.write_bytes(content[:-9] if damage is None else damage)
    assert plain(kept(cache, ROWS, tiny_tokenizer, 64)) == expected
    assert file.read_bytes() == content


def test_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    usual = TokenCache.at(None)
    assert usual.folder is not None
    kept(usual, ROWS, tiny_tokenizer, 64)
    assert not usual.folder.exists()  # too few to be worth a file
    many = [chat("a question", "an answer " * 100, i) for i in range(600)]
    kept(usual, many, tiny_tokenizer, 64)
    assert len(list((tmp_path / "home" / "kdrun" / "tokens").iterdir())) == 1
    assert TokenCache.at("none") == TokenCache(None)
    named = TokenCache.at(str(tmp_path / "named"))
    assert named == TokenCache(tmp_path / "named")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"data\.cache_dir="):
        TokenCache.at(str(tmp_path / "file" / "below"))


def test_a_user_without_a_home_folder_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def getpwuid(number: int) -> Any:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    assert TokenCache.at(None).folder is None
    with pytest.raises(InputError, match="no home folder"):
        TokenCache.at("~/tokens")


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_time(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    cache = TokenCache(tmp_path / "file")
    assert plain(kept(cache, ROWS, tiny_tokenizer, 64)) == encode(ROWS, tiny_tokenizer, 64)


def test_runs_take_their_rows_from_it(tiny_pair: Any, tmp_path: Path, distil: Any) -> None:
    said: list[list[str]] = [[], []]
    for i, lines in enumerate(said):
        distil(
            tmp_path / f"{i}",
            said=lines,
            training__max_steps=1,
            data__cache_dir=str(tmp_path / "t"),
        )
    first, second = ([x for x in lines if "rows:" in x] for lines in said)
    assert first
    assert first == second
    assert (
        len(list((tmp_path / "t").iterdir())) == 3
    )  # the rows, and tokens of training and held-out rows
