"""The code blocks of README and guides run; their commands and links exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [code for name, code in found if name == language]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run_in_the_order_of_the_page(page: Path, tmp_path: Path) -> None:
    code = "\n".join(blocks(page, "python"))
    if not code:
        pytest.skip("no python blocks")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_their_options_exist(page: Path) -> None:
    from kdrun.cli import cli

    for code in blocks(page, ""):
        for line in code.replace("\\\n", " ").splitlines():
            for command in re.findall(r"(?:^|&& )kdrun\b([^&#]*)", line):
                words = [word for word in command.split() if not word.startswith("[")]
                known = cli
                for word in words:
                    if word in getattr(known, "commands", {}):
                        known = known.commands[word]
                options = {
                    option
                    for parameter in known.params
                    for option in parameter.opts + parameter.secondary_opts
                }
                for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", command):
                    assert option in options | {"--help"}, f"{page.name}: {option} in {line!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def said() -> list[str]:
    """Every text in the sources; where a value is put in there is a star."""
    texts = []
    for path in [*(ROOT / "kdrun").rglob("*.py"), *(ROOT / "kdlosses").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "*" for p in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_the_lines_of_the_troubleshooting_page_are_said() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    assert len(lines) >= 8
    texts = said()
    for line in lines:
        pieces = re.split(r"\bN\b(?: tokens)?|\.\.\.", line)
        parts = [piece.strip() for piece in pieces if len(piece.strip()) > 3]
        assert parts, line
        for part in parts:
            assert any(part in text for text in texts), f"{part!r} of {line!r}"


def test_the_files_that_the_architecture_names_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:kdrun|kdlosses|tests|docs)/[\w/.-]*)`", text))
    assert len(named) > 30
    assert not [name for name in named if not (ROOT / name.replace("NAME.py", "")).exists()]


def test_the_architecture_shows_the_wings_in_the_order_that_is_enforced():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = re.search(r"```\n(cli .*?)---", text, re.DOTALL)
    assert picture is not None
    shown = [line.split()[0] for line in picture[1].splitlines()]
    layers = (ROOT / "tests" / "test_layers.py").read_text(encoding="utf-8")
    enforced = re.findall(r'"(\w+)"', re.search(r"WINGS = \((.*?)\)", layers, re.DOTALL)[1])
    assert shown == enforced[::-1]
