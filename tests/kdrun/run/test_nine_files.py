"""The shapes of docs/data.md, and nine files of everyday shapes: each trains a step."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kdrun.cli import cli
from kdrun.data.rows import SourceOf, load_sources

PAGE = Path(__file__).parents[3] / "docs" / "data.md"
EXAMPLES = re.findall(r"^\| ([^|`]+?)(?: \(.*\))? \| `(\{.*\})` \|$", PAGE.read_text("utf-8"), re.M)
USER = {"role": "user", "content": "the user asks"}
ANSWER = {"role": "assistant", "content": "an answer"}
CALL = {"id": "1", "type": "function", "function": {"name": "ask", "arguments": '{"a": 1}'}}


def test_the_page_has_the_shapes() -> None:
    assert len(EXAMPLES) >= 12


@pytest.mark.parametrize(("shape", "example"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_the_examples_of_the_page_are_rows(shape: str, example: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(example + "\n", encoding="utf-8")
    found = load_sources([SourceOf(str(file), prompts="prompts alone" in shape)])
    assert not found.bad
    assert len(found.rows) == (2 if "several answers" in shape else 1)
    assert not [line for line in found.warnings() if "not used" in line]


FILES: dict[str, Callable[[int], dict[str, Any]]] = {
    "tool calls": lambda i: {
        "tools": [{"type": "function", "function": {"name": "ask", "parameters": {}}}],
        "messages": [
            {"role": "user", "content": f"the user asks {i}"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "a result", "tool_call_id": "1"},
            ANSWER,
        ],
    },
    "developer": lambda i: {
        "messages": [{"role": "developer", "content": f"be brief {i}"}, USER, ANSWER]
    },
    "prompt and completion": lambda i: {
        "prompt": [{"role": "user", "content": f"the user asks {i}"}],
        "completion": [ANSWER],
    },
    "gzip": lambda i: {"prompt": f"the user asks {i}", "response": "an answer"},
    "preferences": lambda i: {"prompt": f"asks {i}", "chosen": "an answer", "rejected": "a"},
    "answers as a list": lambda i: {"question": f"asks {i}", "answer": ["an answer", "another"]},
    "messages as text": lambda i: {
        "messages": json.dumps([{"role": "user", "content": f"asks {i}"}, ANSWER])
    },
    "problem and solution": lambda i: {"problem": f"asks {i}", "solution": "an answer"},
    "reasoning": lambda i: {
        "messages": [
            {"role": "user", "content": f"asks {i}"},
            ANSWER | {"reasoning_content": "the user asks a question"},
        ]
    },
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_trains_a_step(distil: Callable[..., Path], tmp_path: Path, name: str) -> None:
    rows = "".join(json.dumps(FILES[name](i)) + "\n" for i in range(24)).encode()
    file = tmp_path / "rows.jsonl"
    file.write_bytes(gzip.compress(rows) if name == "gzip" else rows)
    said: list[str] = []
    folder = distil(tmp_path / "run", said, data__train=str(file), training__max_steps=1)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 1
    assert not [line for line in said if "not used" in line]


class TestShow:
    def show(self, *arguments: object) -> str:
        words = ["data", "show", *map(str, arguments)]
        done = CliRunner().invoke(cli, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    def test_rows_with_their_supervised_tokens(self, tiny_pair: Any) -> None:
        said = self.show(tiny_pair.rows, "--student", tiny_pair.student, "--rows", 1)
        assert "40 rows of 40, format prompt_response" in said
        assert "rows.jsonl, line 1\n" in said
        first = json.loads(Path(tiny_pair.rows).read_text(encoding="utf-8").splitlines()[0])
        assert f"[[{first['response']}<|im_end|>]]" in said
        assert "line 2\n" not in said
        assert "tokens per row" in said
        counts = [
            int(line.split()[3]) for line in said.splitlines() if " to " in line and "#" in line
        ]
        assert sum(counts) == 40

    def test_what_is_skipped_and_why(self, tiny_pair: Any, tmp_path: Path) -> None:
        file = tmp_path / "rows.jsonl"
        good = {"prompt": "a", "response": "b", "id": 7}
        file.write_text(json.dumps(good) + "\n" + json.dumps({"prompt": "a", "response": ""}))
        said = self.show(file, "--tokenizer", tiny_pair.teacher)
        assert "skipped 1 of 2 rows: line 2: has the field 'response' empty" in said
        assert "not used: id" in said

    def test_text_and_a_configuration(self, tmp_path: Path) -> None:
        file, config = tmp_path / "text.txt", tmp_path / "run.yaml"
        file.write_text("one document\n\nanother")
        config.write_text(f"data: {{train: {file}}}\n")
        said = self.show("--config", config, "--rows", 1)
        assert "format text" in said
        assert "[[one document" in said

    def test_prompts_alone_are_shown_where_the_procedure_writes_answers(
        self, tmp_path: Path
    ) -> None:
        file = tmp_path / "asks.jsonl"
        file.write_text("".join(f'{{"prompt": "{n}?"}}\n' for n in range(3)))
        said = self.show(file, "--set", "procedure.spec=seqkd")
        assert "3 of 3 rows: prompts without answers, which the procedure writes" in said
        for spec in ("null", "gkd:lambda=0.5"):
            done = CliRunner().invoke(
                cli, ["data", "show", str(file), "--set", f"procedure.spec={spec}"]
            )
            assert "prompts but no answers" in str(done.exception)

    @pytest.mark.parametrize(
        ("arguments", "line"),
        [
            ((), "pass the rows to show"),
            (("rows.jsonl", "--student", "a", "--tokenizer", "b"), "name the same thing"),
            (("none.jsonl",), "none.jsonl: no such file"),
        ],
    )
    def test_wrong_input_is_one_line(self, arguments: tuple[str, ...], line: str) -> None:
        done = CliRunner().invoke(cli, ["data", "show", *arguments])
        assert done.exception is not None
        assert line in str(done.exception)
