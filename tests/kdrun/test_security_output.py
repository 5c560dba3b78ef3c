"""What names, texts and secrets become in the files that commands write."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from commands import Completed, kdrun
from words import CHAT, WORDS, save_model, save_rows, save_tokenizer, usual_rows

HOSTILE = "=cmd|<script>alert(1)<b onclick='x'>\"&$x_1{%}#^~\\end"
FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1+1", "\r=1"]


def save_pair(folder: Path, teacher: str = "teacher", student: str = "student") -> list[object]:
    """Two models and rows; the options that name them."""
    for name, seed in ((teacher, 1), (student, 2)):
        save_model(folder / name, len(WORDS) + 1, seed)
        save_tokenizer(folder / name, ("<end>",), CHAT)
    rows = usual_rows()
    rows[3] = {"prompt": "<script>alert(1)</script>", "response": "</td><img src=x onerror=x>"}
    save_rows(folder / "rows.jsonl", rows)
    pair: list[object] = ["--teacher", teacher, "--student", student, "--data", "rows.jsonl"]
    return [*pair, "--max-length", 32, "--batch-size", 2, "--set", "data.cache_dir=none"]


class Tags(HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of models whose names are dangerous everywhere."""
    folder = tmp_path_factory.mktemp("hostile")
    pair = save_pair(folder, HOSTILE, f"-{HOSTILE}".replace("-=", "@"))
    for loss in ("forward_kl_chunked", "generalized_jsd_chunked:beta=0.1"):
        pair += ["--loss", loss]
    given = [*pair, "--seeds", 2, "--max-steps", 2, "--output", "comparison"]
    done = kdrun("compare-losses", *given, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "comparison"


def test_the_page_has_no_element_from_a_name(hostile: Path) -> None:
    page = Tags()
    page.feed((hostile / "report.html").read_text("utf-8"))
    assert HOSTILE in page.text
    assert [tag for tag, _ in page.found].count("script") == 1
    assert {tag for tag, _ in page.found}.isdisjoint({"b", "img", "iframe", "object"})
    for tag, attributes in page.found:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("href", "src", "action"):
            value = attributes.get(name) or ""
            assert not value.lower().startswith(("javascript:", "http:", "//")), (tag, value)


def test_figures_are_xml_without_scripts(hostile: Path) -> None:
    figures = list((hostile / "figures").glob("*.svg"))
    assert figures
    for figure in figures:
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.parse(figure).iter()}
        assert tags.isdisjoint({"script", "b", "foreignObject"})


def test_no_cell_is_a_formula(hostile: Path) -> None:
    rows = list(csv.reader(io.StringIO((hostile / "results.csv").read_text("utf-8"), newline="")))
    assert len({len(row) for row in rows}) == 1
    cells = [cell for row in rows for cell in row]
    assert f"'{HOSTILE}" in cells
    for cell in cells:
        if cell.lstrip().startswith(("=", "+", "-", "@")):
            float(cell)  # a number may have a sign


def test_latex_has_no_macro_from_a_name(hostile: Path) -> None:
    text = (hostile / "results.tex").read_text("utf-8")
    without_comments = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    macros = set(re.findall(r"\\([a-zA-Z]+)", without_comments))
    assert "end" in macros
    assert re.findall(r"\\end(?!\{(?:table|tabular)\})", without_comments) == []
    bare = re.sub(r"\\[$&#_%{}]|\$\\pm\$|\$-\$", "", without_comments)
    assert "#" not in bare
    assert "^" not in bare
    assert "~" not in bare
    assert "$x" not in bare


@pytest.mark.parametrize("text", [*FORMULAS, HOSTILE, "a\nb", 'a"b,c;d'])
def test_a_cell_keeps_its_place_and_is_text(text: str) -> None:
    from kdrun.compare.report.tables import _cell

    stream = io.StringIO()
    csv.writer(stream).writerow([_cell(text), "next"])
    (row,) = csv.reader(io.StringIO(stream.getvalue(), newline=""))
    assert row[1] == "next"
    assert not row[0].lstrip().startswith(("=", "+", "-", "@"))


# --- secrets ------------------------------------------------------------------------------------

SECRETS = {
    "HF_TOKEN": "hf_marktokenmarktokenmarktokenmarkto",
    "HUGGING_FACE_HUB_TOKEN": "hf_marksecondmarksecondmarksecondma",
    "WANDB_API_KEY": "markwandb0123456789012345678901234567890",
    "KDRUN_API_KEY": "markkdrunkey",
    "OPENAI_API_KEY": "sk-markopenai",
    "AWS_SECRET_ACCESS_KEY": "markaws",
}
MARK = re.compile(rb"mark(token|second|wandb|kdrun|openai|aws|password)")


def leaks(folder: Path, *runs: Completed[str]) -> list[str]:
    """Where a secret stands."""
    found = [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and MARK.search(path.read_bytes())
    ]
    return found + [
        f"output of {done.args}"
        for done in runs
        if MARK.search((done.stdout + done.stderr).encode())
    ]


def test_marks_are_found_where_they_stand(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(json.dumps(SECRETS), encoding="utf-8")
    done = Completed(["kdrun"], 0, "", SECRETS["WANDB_API_KEY"])
    assert len(leaks(tmp_path, done)) == 2
    assert all(MARK.search(secret.encode()) for secret in SECRETS.values())


@pytest.mark.slow
def test_no_secret_of_the_environment_is_written(tmp_path: Path) -> None:
    pair = save_pair(tmp_path)
    shared = {"cwd": tmp_path, **SECRETS}
    data = pair[4:8]
    commands: list[list[object]] = [
        [*pair, "--max-steps", 2, "--output", "run", "--set", "training.save_steps=1"],
        ["--resume", "--output", "run", "--max-steps", 3],
        [*pair, "--max-steps", 2, "--dry-run"],
        ["evaluate", "run", *data, "--output", "measures.json"],
        ["generate", "run", "--prompt", "the cat"],
        ["cache-teacher", *pair, "--output", "cache"],
        [*_comparison(pair), "--output", "comparison"],
        ["report", "comparison"],
    ]
    for command in commands:
        done = kdrun(*command, **shared)  # type: ignore[arg-type]
        assert done.returncode == 0, done.stderr
        assert leaks(tmp_path, done) == []
    # Also where something goes wrong.
    for command in (
        [*pair, "--max-steps", 2, "--teacher", "no/such", "--output", "wrong"],
        [*pair, "--max-steps", 2, "--loss", "no_such_loss", "--output", "wrong"],
        [*pair, "--report-to", "wandb", "--output", "tracked"],
    ):
        done = kdrun(*command, WANDB_MODE="offline", **shared)  # type: ignore[arg-type]
        assert leaks(tmp_path, done) == []


def _comparison(pair: list[object]) -> list[object]:
    return ["compare-losses", *pair, "--loss", "forward_kl_chunked", "--seeds", 2, "--max-steps", 2]


@pytest.mark.slow  # each job imports its libraries
def test_no_secret_is_written_by_jobs(tmp_path: Path) -> None:
    given = [*_comparison(save_pair(tmp_path)), "--jobs", 2, "--output", "comparison"]
    done = kdrun(*given, cwd=tmp_path, **SECRETS)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "comparison").rglob("worker-*.log"))
    assert leaks(tmp_path, done) == []


URL = "https://user:markpassword@example.invalid"


@pytest.mark.parametrize(
    "given",
    [
        ("--teacher", f"{URL}/model"),
        ("--student", f"{URL}/model"),
        ("--data", f"{URL}/rows.jsonl"),
        ("--eval-data", f"{URL}/rows.jsonl"),
        ("--teacher-cache", f"{URL}/cache"),
        ("--config", f"{URL}/run.yaml"),
        ("--set", f"model.teacher_cache={URL}"),
        ("--set", f"procedure.text={URL}/rows.jsonl"),
        ("--set", f"training.save_steps={URL}"),
        ("--set", f"data.no_such_key={URL}"),
        ("--loss", URL),
        ("--report-to", URL),
    ],
)
def test_a_password_in_a_url_is_not_repeated(tmp_path: Path, given: tuple[str, str]) -> None:
    pair = save_pair(tmp_path)
    done = kdrun(*pair, "--max-steps", 2, "--output", "run", *given, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert leaks(tmp_path, done) == []


def test_a_password_that_another_option_supersedes_is_not_written(tmp_path: Path) -> None:
    superseded = ["--set", f"model.teacher={URL}/model", *save_pair(tmp_path)]
    done = kdrun(*superseded, "--max-steps", 2, "--output", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "https://***@example.invalid/model" in (tmp_path / "run/summary.json").read_text("utf-8")
    assert leaks(tmp_path, done) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:secret@host/path@1", "https://***@host/path@1"),
        ("https://se@cret@host", "https://***@host"),
        ("'https:/token@host/a': no such file", "'https:/***@host/a': no such file"),
        ("got '//user:secret@host'", "got '//***@host'"),
        ("data/a@b.jsonl: no such file", "data/a@b.jsonl: no such file"),
        ("/data/owner@train: no split", "/data/owner@train: no split"),
        ("owner/name:config@split", "owner/name:config@split"),
        ("https://host/owner@main", "https://host/owner@main"),
    ],
)
def test_only_logins_are_hidden(text: str, shown: str) -> None:
    from kdrun.errors import without_passwords

    assert without_passwords(text) == shown


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", f"{URL}/model"),
        ("generate", f"{URL}/model", "--prompt", "the"),
        ("init-student", f"{URL}/model", "--keep-layers", "1", "--output", "made"),
        ("cache-teacher", "--teacher", f"{URL}/model", "--output", "cache"),
        ("compare-losses", "--teacher", f"{URL}/model", "--loss", "forward_kl_chunked"),
        ("report", f"{URL}/comparison"),
        (f"{URL}/command",),
        (f"--{URL}",),
    ],
)
def test_a_password_in_an_argument_is_not_repeated(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    done = kdrun(*command, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert leaks(tmp_path, done) == []
