"""The site builds without a warning, has a page for each loss, and needs no network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

from kdlosses import available_losses, get_loss
from kdrun.losses.describe import doc_parts

ROOT = Path(__file__).parents[1]
NAMES = sorted({ref.name for ref in available_losses() if ref.distribution == "kdlosses"})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("material", "matplotlib"):
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "-f",
            "docs/mkdocs.yml",
            "-d",
            folder,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def words(page: Path) -> str:
    """What a page shows, without its markup."""
    article = re.search(r"<article.*?</article>", page.read_text(encoding="utf-8"), re.DOTALL)
    assert article is not None
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", article[0])).split())


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_has_a_page_with_all_that_it_says(site: Path, name: str) -> None:
    page, loss = site / "losses" / name / "index.html", get_loss(name).loss
    text, parts = words(page), doc_parts(loss)
    without_marks = [part.replace("``", "") for part in (*parts.about, *parts.limits)]
    squeezed = text.replace(" ", "")
    for part in (parts.formula, parts.reference, *without_marks):
        assert part
        assert part.replace(" ", "") in squeezed
    for field, info in type(loss).model_fields.items():
        assert field in text
        assert str(info.description) in text
    assert f"--loss {name}_chunked" in text
    assert f'<img alt="Value and gradient of {name}"' in page.read_text(encoding="utf-8")
    picture = (site / "losses" / f"{name}.svg").read_text(encoding="utf-8")
    assert "<svg" in picture


def test_every_loss_stands_in_the_index_and_in_the_navigation(site: Path) -> None:
    page = (site / "losses" / "index.html").read_text(encoding="utf-8")
    for name in NAMES:
        assert page.count(f'href="{name}/"') >= 2
    assert "1/2 sum |p - q|" in words(site / "losses" / "index.html")


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(NAMES) + 8
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for tag in re.findall(r"<(?:link|script|img|iframe)\b[^>]*>", text):
            assert not re.search(r"""(?:href|src)=["']?(?:https?:)?//""", tag), f"{page}: {tag}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?https?:", style.read_text(encoding="utf-8"))


def test_its_own_sources_are_no_pages_of_it(site: Path) -> None:
    assert not (site / "mkdocs.yml").exists()
    assert not (site / "generated_pages.py").exists()


def test_every_key_of_the_configuration_is_on_its_page(site: Path) -> None:
    from kdrun.config.sections import RunConfig

    page = unescape(re.sub(r"<[^>]+>", "", (site / "configuration/index.html").read_text("utf-8")))
    for name, section in RunConfig().model_dump().items():
        assert f"{name}:" in page
        for key in section:
            assert f"{key}:" in page
