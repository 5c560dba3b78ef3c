from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdrun.data.rows import ChatRow, TextRow, load_rows
from kdrun.errors import InputError

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(content: str | bytes | list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def turns(row: Any) -> list[tuple[str, str]]:
    assert isinstance(row, ChatRow)
    return [(message.role, message.content) for message in row.messages]


def error_of(path: str | Path, **options: Any) -> str:
    with pytest.raises(InputError) as info:
        load_rows(path, **options)
    message = str(info.value)
    assert "\n" not in message
    return message


PAIR = {"prompt": "a", "response": "b"}


class TestFiles:
    @pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.txt", "rows"])
    @pytest.mark.parametrize(
        "content",
        [
            '{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": "d"}\n',
            '\n[{"prompt": "a", "response": "b"},\n {"prompt": "c", "response": "d"}]',
            '{"data": [\n{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]}',
            '{"prompt": "a", "response": "b"}\r\n\r\n{"prompt": "c", "response": "d"}\r\n',
        ],
        ids=["lines", "list", "object", "windows"],
    )
    def test_the_content_decides_and_not_the_extension(
        self, write: Write, name: str, content: str
    ) -> None:
        rows = load_rows(write(content, name)).rows
        assert [turns(row) for row in rows] == [
            [("user", "a"), ("assistant", "b")],
            [("user", "c"), ("assistant", "d")],
        ]

    def test_one_object_over_several_lines_is_one_row(self, write: Write) -> None:
        assert len(load_rows(write(json.dumps(PAIR, indent=2))).rows) == 1

    def test_d11_a_byte_order_mark_changes_nothing(self, write: Write) -> None:
        line = b'{"prompt":"h\xc3\xa9","response":"\xe4\xbd\xa0"}\n'
        without = load_rows(write(line)).rows
        with_mark = load_rows(write(b"\xef\xbb\xbf" + line)).rows
        assert without == with_mark
        assert turns(without[0]) == [("user", "hé"), ("assistant", "你")]

    def test_a_line_separator_inside_a_string_does_not_end_the_line(self, write: Write) -> None:
        row = {"prompt": "a\u2028b\u0085c", "response": "d"}
        path = write(json.dumps(row, ensure_ascii=False))
        assert turns(load_rows(path).rows[0])[0] == ("user", "a\u2028b\u0085c")

    def test_text_without_blank_lines_is_a_document_a_line(self, write: Write) -> None:
        path = write("one\ntwo\nthree\n\n", "a.txt")
        rows = load_rows(path).rows
        assert [row.text for row in rows if isinstance(row, TextRow)] == ["one", "two", "three"]
        assert [row.position.number for row in rows] == [1, 2, 3]

    def test_text_with_blank_lines_is_a_document_a_paragraph(self, write: Write) -> None:
        rows = load_rows(write("\none\nmore\n\n \ntwo\n", "a.txt")).rows
        assert [row.text for row in rows if isinstance(row, TextRow)] == ["one\nmore", "two"]
        assert [row.position.number for row in rows] == [2, 6]

    def test_text_that_only_looks_like_json_can_be_called_text(self, write: Write) -> None:
        path = write('["Hello," he said.\n', "a.txt")
        assert "broken JSON" in error_of(path)
        rows = load_rows(path, data_format="text").rows
        assert isinstance(rows[0], TextRow)

    def test_bracketed_text_is_text(self, write: Write) -> None:
        assert load_rows(write("[1] A footnote.\n", "a.txt")).data_format == "text"

    def test_a_list_of_strings_is_text(self, write: Write) -> None:
        rows = load_rows(write('["one", "two"]', "a.json")).rows
        assert [row.text for row in rows if isinstance(row, TextRow)] == ["one", "two"]


class TestFormats:
    def test_text_field(self, write: Write) -> None:
        found = load_rows(write([{"text": "one", "source": "wiki"}]))
        assert found.data_format == "text"
        assert found.rows[0] == TextRow("one", found.rows[0].position)

    @pytest.mark.parametrize(
        ("prompt", "response"),
        [("prompt", "completion"), ("question", "answer"), ("instruction", "response")],
    )
    def test_usual_names(self, write: Write, prompt: str, response: str) -> None:
        found = load_rows(write([{"id": 1, prompt: "a", response: "b"}]))
        assert turns(found.rows[0]) == [("user", "a"), ("assistant", "b")]

    def test_named_fields(self, write: Write) -> None:
        path = write([{"q": "a", "gold": 42, "answer": "no"}])
        found = load_rows(path, prompt_field="q", response_field="gold")
        assert turns(found.rows[0]) == [("user", "a"), ("assistant", "42")]

    def test_a_named_field_that_is_nowhere(self, write: Write) -> None:
        message = error_of(write([PAIR]), prompt_field="promt")
        assert "'promt'" in message
        assert "did you mean prompt?" in message

    def test_alpaca_with_and_without_input(self, write: Write) -> None:
        path = write(
            [
                {"instruction": "add", "input": "1 2", "output": "3"},
                {"instruction": "say hi", "input": "", "output": "hi"},
                {"instruction": "say ho", "output": "ho"},
            ]
        )
        found = load_rows(path)
        assert found.data_format == "alpaca"
        assert not found.bad
        assert [turns(row)[0][1] for row in found.rows] == ["add\n\n1 2", "say hi", "say ho"]

    def test_self_instruct_rows_become_one_row_an_instance(self, write: Write) -> None:
        instances = [{"input": "1", "output": "one"}, {"input": "", "output": "none"}]
        found = load_rows(write([{"instruction": "name", "instances": instances}]))
        assert [turns(row)[1][1] for row in found.rows] == ["one", "none"]

    def test_a_system_field_comes_first(self, write: Write) -> None:
        found = load_rows(write([{**PAIR, "system": "be kind"}]))
        assert turns(found.rows[0])[0] == ("system", "be kind")

    def test_messages(self, write: Write) -> None:
        path = write(
            [
                {
                    "messages": [
                        {"role": "system", "content": "s"},
                        {"role": "user", "content": [{"type": "text", "text": "a"}]},
                        {"role": "assistant", "content": "b"},
                        {"role": "user", "content": "and?"},
                    ]
                }
            ]
        )
        found = load_rows(path)
        assert found.data_format == "messages"
        assert turns(found.rows[0]) == [("system", "s"), ("user", "a"), ("assistant", "b")]

    @pytest.mark.parametrize("user", ["human", "user", "Human"])
    @pytest.mark.parametrize("assistant", ["gpt", "assistant", "chatgpt", "bot"])
    def test_d15_role_aliases(self, write: Write, user: str, assistant: str) -> None:
        talk = [{"from": user, "value": "x"}, {"from": assistant, "value": "y"}]
        assert turns(load_rows(write([{"conversations": talk}])).rows[0]) == [
            ("user", "x"),
            ("assistant", "y"),
        ]

    def test_d15_an_odd_role_is_named_with_its_row(self, write: Write) -> None:
        good = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
        odd = [{"from": "human", "value": "x"}, {"from": "bing", "value": "y"}]
        message = error_of(write([{"conversations": good}, {"conversations": odd}]))
        assert "rows.jsonl, line 2" in message
        assert "'bing'" in message

    def test_an_answer_to_nothing_is_left_out(self, write: Write) -> None:
        talk = [("gpt", "hello"), ("human", "x"), ("gpt", "y")]
        path = write([{"conversations": [{"from": r, "value": v} for r, v in talk]}])
        assert turns(load_rows(path).rows[0]) == [("user", "x"), ("assistant", "y")]

    def test_system_first(self, write: Write) -> None:
        talk = [("system", "s"), ("human", "x"), ("gpt", "y")]
        path = write([{"conversations": [{"from": r, "value": v} for r, v in talk]}])
        assert turns(load_rows(path).rows[0])[0] == ("system", "s")

    def test_a_format_that_does_not_fit(self, write: Write) -> None:
        message = error_of(write([PAIR]), data_format="alpaca")
        assert "instruction" in message
        assert "prompt, response" in message

    def test_an_unknown_format(self, write: Write) -> None:
        assert "prompt_response" in error_of(write([PAIR]), data_format="csv")

    def test_no_known_fields(self, write: Write) -> None:
        message = error_of(write([{"foo": "a", "bar": "b"}]))
        assert "foo, bar" in message
        assert "data.prompt_field" in message


class TestBadRows:
    ROWS = (
        {"instruction": "a", "input": "", "output": "ok"},
        {"instruction": "a", "input": "", "output": ""},
        {"instruction": "a"},
        {"instruction": "a", "output": None},
    )

    def test_d14_they_are_counted_and_left_out(self, write: Write) -> None:
        found = load_rows(write(list(self.ROWS)))
        assert len(found.rows) == 1
        assert [(bad.position.number, bad.reason) for bad in found.bad] == [
            (2, "has the field 'output' empty"),
            (3, "has no field 'output'"),
            (4, "has the field 'output' set to null"),
        ]
        assert any("1 of 4 rows: line 3: has no field 'output'" in w for w in found.warnings())

    def test_only_the_first_five_are_named(self, write: Write) -> None:
        found = load_rows(write([PAIR, *[{"prompt": "a", "response": " "}] * 9]))
        (warning,) = found.warnings()
        assert "skipped 9 of 10 rows: lines 2, 3, 4, 5, 6 and 4 more" in warning

    def test_d14_strict_refuses_the_first(self, write: Write) -> None:
        message = error_of(write(list(self.ROWS)), strict=True)
        assert "rows.jsonl, line 2" in message
        assert "'output'" in message

    def test_all_bad(self, write: Write) -> None:
        message = error_of(write(list(self.ROWS[1:])))
        assert "none of the 3 rows can be used; line 1 has the field 'output' empty" in message

    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": "", "response": "b"},
            {"prompt": "a", "response": ["b", 1]},
            {"prompt": "a", "response": "\ud83d"},
            {"prompt": "a", "response": True},
            7,
            None,
        ],
    )
    def test_kinds_of_bad_rows(self, write: Write, row: Any) -> None:
        found = load_rows(write([PAIR, row]))
        assert [bad.position.number for bad in found.bad] == [2]

    @pytest.mark.parametrize(
        "talk",
        [
            [],
            "hello",
            [{"role": "user", "content": "a"}],
            [{"role": "assistant", "content": "a"}],
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}],
            [{"role": "user", "content": None}, {"role": "assistant", "content": "b"}],
            [{"content": "a"}, {"role": "assistant", "content": "b"}],
            ["a", "b"],
            [{"role": "user", "content": [{"type": "image"}]}],
        ],
    )
    def test_bad_conversations(self, write: Write, talk: Any) -> None:
        good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        found = load_rows(write([{"messages": good}, {"messages": talk}]))
        assert len(found.rows) == len(found.bad) == 1


class TestErrors:
    def test_a_wrong_path_suggests_close_names(self, write: Write) -> None:
        path = write([PAIR], "train.jsonl")
        assert f"did you mean {path}?" in error_of(path.with_name("trian.jsonl"))

    def test_a_wrong_folder_suggests_close_names(self, write: Write) -> None:
        folder = write([PAIR]).parent
        wrong = folder.with_name(folder.name + "x") / "rows.jsonl"
        assert f"did you mean {folder}" in error_of(wrong)

    def test_the_home_folder_of_nobody(self) -> None:
        assert "~nobody-here/rows.jsonl: no home folder" in error_of("~nobody-here/rows.jsonl")

    def test_a_folder_without_data(self, tmp_path: Path) -> None:
        (tmp_path / "picture.png").touch()
        assert "the folder contains no data file" in error_of(tmp_path)

    @pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
    def test_an_empty_file(self, write: Write, content: str) -> None:
        assert "rows.jsonl: the file is empty" in error_of(write(content))

    def test_an_empty_list(self, write: Write) -> None:
        assert "contains no rows" in error_of(write("[]"))

    @pytest.mark.parametrize(
        ("content", "line"),
        [
            ('{"prompt": "a", "response": "b"}\n{"prompt": "a", \n', 2),
            ('{"prompt": "a", "response": "b"}\n\nnot json\n', 3),
            ('{"prompt": "a", \n{"prompt": "a", "response": "b"}\n', 1),
            ('{"prompt": "a", "response": "b\n', 1),
            ("not json\n", 1),
            ('[{"prompt": "a", "response": "b"},\n {"prompt": "a",}\n]', 2),
            ('{\n "prompt": "a",\n "response"\n}', 4),
        ],
    )
    def test_broken_json_names_file_and_line(self, write: Write, content: str, line: int) -> None:
        assert f"rows.jsonl, line {line}: broken JSON" in error_of(write(content))

    def test_not_utf8_names_the_line(self, write: Write) -> None:
        message = error_of(write(b'{"prompt": "a",\n "response": "\xe9"}'))
        assert "rows.jsonl, line 2: not UTF-8" in message

    @pytest.mark.parametrize("start", [b"PK\x03\x04", "a".encode("utf-16")])
    def test_other_kinds_of_files(self, write: Write, start: bytes) -> None:
        assert "rows.jsonl is" in error_of(write(start + b"rest"))


class TestTables:
    def test_csv(self, write: Write) -> None:
        content = 'prompt,response,n\n"a, b","c\n""d""",1\n\ne,f,2\n'
        for mark in (b"", b"\xef\xbb\xbf"):
            for end in (b"\n", b"\r\n"):
                data = mark + content.encode().replace(b"\n", end)
                found = load_rows(write(data, "rows.csv"))
                assert found.data_format == "prompt_response"
                assert [turns(row) for row in found.rows] == [
                    [("user", "a, b"), ("assistant", 'c\n"d"')],
                    [("user", "e"), ("assistant", "f")],
                ]
                assert [row.position.number for row in found.rows] == [3, 5]

    def test_tabs_and_very_long_fields(self, write: Write) -> None:
        path = write("text\tn\n" + "x, " * 70_000 + "\t1\n", "rows.tsv")
        (row,) = load_rows(path).rows
        assert isinstance(row, TextRow)
        assert len(row.text) == 3 * 70_000

    def test_a_row_of_csv_without_an_answer_is_left_out_by_its_line(self, write: Write) -> None:
        found = load_rows(write("prompt,response\na,b\nc\nd,\n", "rows.csv"))
        assert [bad.position.number for bad in found.bad] == [3, 4]

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ("prompt,response\na,b\na,b,c\n", "line 3: 3 fields, but the first line names 2"),
            ("prompt,,x\na,b,c\n", "line 1: the first line must name the fields"),
            ("a,a\nb,c\n", "line 1: the first line must name the fields"),
            ('prompt,response\na,"b\n', "broken CSV"),
            ("prompt,response\n", "contains no rows"),
        ],
    )
    def test_broken_csv(self, write: Write, content: str, expected: str) -> None:
        assert expected in error_of(write(content, "rows.csv"))

    def test_parquet_gives_what_json_lines_give(self, write: Write, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        talk = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
        other = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        for rows in ([PAIR, {**PAIR, "prompt": "é"}], [{"messages": other}, {"messages": talk}]):
            parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
            found = load_rows(tmp_path / "a.parquet").rows
            assert [turns(row) for row in found] == [turns(r) for r in load_rows(write(rows)).rows]
            assert [row.position.unit for row in found] == ["row", "row"]

    def test_a_broken_parquet_file(self, write: Write) -> None:
        pytest.importorskip("pyarrow")
        assert "broken Parquet file" in error_of(write(b"PAR1rest", "rows.parquet"))


class TestHub:
    """The hub cannot be reached here; what is asked of it is what the package would be asked."""

    @pytest.mark.parametrize(
        ("source", "asked"),
        [
            ("owner/name", ("owner/name", None, "train", {})),
            ("owner/name:main", ("owner/name", "main", "train", {})),
            ("owner/name:main@test", ("owner/name", "main", "test", {})),
            ("owner/name@test#v1.0", ("owner/name", None, "test", {"revision": "v1.0"})),
        ],
    )
    def test_rows_of_a_data_set(
        self, monkeypatch: pytest.MonkeyPatch, source: str, asked: object
    ) -> None:
        import datasets

        calls = []

        def load_dataset(name: str, configuration: Any, split: str, **more: Any) -> Any:
            calls.append((name, configuration, split, more))
            return datasets.Dataset.from_dict({"question": ["a"], "answer": ["b"]})

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        found = load_rows(source)
        assert calls == [asked]
        assert turns(found.rows[0]) == [("user", "a"), ("assistant", "b")]
        assert str(found.rows[0].position) == f"{source}, row 1"

    @pytest.mark.parametrize(
        ("error", "line"),
        [
            (ConnectionError("offline\nmore"), "(offline)"),
            (
                ValueError("Unknown split \"trian\". Should be one of ['train', 'test']."),
                "the data set has no split 'trian'; did you mean @train?",
            ),
        ],
    )
    def test_out_of_reach(
        self, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
    ) -> None:
        import datasets

        def load_dataset(*given: Any, **options: Any) -> None:
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert line in error_of("owner/name@trian")

    @pytest.mark.parametrize("name", ["a/b/c", "owner/name.jsonl", "./owner/name", "name"])
    def test_paths_are_not_taken_for_names(self, name: str) -> None:
        assert "no such file" in error_of(name)


def test_d12_the_platforms_encoding_has_no_say(write: Write) -> None:
    path = write('{"prompt": "\u201d", "response": "\u2764"}\n')
    code = (
        "import sys\n"
        "from kdrun.data.rows import load_rows\n"
        "row = load_rows(sys.argv[1]).rows[0]\n"
        "print(ascii([m.content for m in row.messages]))\n"
    )
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONPATH": str(Path(__file__).resolve().parents[3]),
    }
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "-W", "error", "-c", code, str(path)],
        capture_output=True,
        env=environment,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == r"['\u201d', '\u2764']"
    assert not done.stderr


@pytest.mark.parametrize(
    ("name", "data_format", "count"),
    [
        ("alpaca_en_demo.json", "alpaca", 999),
        ("gsm8k_train.jsonl", "prompt_response", 7473),
        ("gsm8k_test.jsonl", "prompt_response", 1319),
        ("user_oriented_instructions.jsonl", "alpaca", 252),
        ("wiki_demo.txt", "text", 30),
    ],
)
def test_real_files(shared_data: Path, name: str, data_format: str, count: int) -> None:
    found = load_rows(shared_data / name)
    assert (found.data_format, len(found.rows), len(found.bad)) == (data_format, count, 0)


def test_a_real_file_without_answers(shared_data: Path) -> None:
    assert "mc1_targets" in error_of(shared_data / "truthfulqa_mc.json")


def test_reading_many_rows_shows_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("kdrun.data.rows._SHOWN", 3000)
    path = tmp_path / "many.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}", "response": "a"}}\n' for i in range(3412)))
    assert len(load_rows(path).rows) == 3412
    said = capsys.readouterr().err
    assert "reading rows 1000/3412" in said
    assert "rows/s" in said
