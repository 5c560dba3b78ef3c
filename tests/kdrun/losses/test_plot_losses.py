"""The plot of a loss: what it shows, in the terminal and as a file."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kdlosses import available_losses
from kdrun.errors import InputError
from kdrun.losses.plot import TEACHER, check_plot_file, draw_text, loss_curve, write_plot

NAMES = sorted({ref.name for ref in available_losses() if ref.distribution == "kdlosses"})
PNG = b"\x89PNG\r\n\x1a\n"


def show(*arguments: object, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """``kdrun losses show``, its output as bytes; never a terminal."""
    return subprocess.run(
        [Path(sys.executable).with_name("kdrun"), "losses", "show", *map(str, arguments)],
        capture_output=True,
        env={**os.environ, **variables},
        timeout=280,
        check=False,
    )


def test_the_curve_is_that_of_the_library_s_forward_kl() -> None:
    curve = loss_curve("forward_kl", [0.1, 0.6, 0.9])
    p = TEACHER[0]
    for q, value, gradient in zip(curve.student, curve.values, curve.gradients, strict=True):
        expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        assert value == pytest.approx(expected, abs=1e-12)
        assert gradient == pytest.approx(q - p, abs=1e-12)


@pytest.mark.parametrize("spec", [*NAMES, "skew_forward_kl_chunked:alpha=0.5"])
def test_every_loss_has_its_minimum_where_the_student_is_the_teacher(spec: str) -> None:
    curve = loss_curve(spec, [step / 20 for step in range(1, 20)])
    assert all(math.isfinite(value) for value in curve.values + curve.gradients)
    assert curve.student[curve.values.index(min(curve.values))] == TEACHER[0]
    for q, gradient in zip(curve.student, curve.gradients, strict=True):
        if q != TEACHER[0]:
            assert (gradient > 0) == (q > TEACHER[0])


@pytest.mark.parametrize("spec", [*NAMES, "alpha_beta:alpha=3,beta=-3"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_the_text_fits_a_terminal_and_its_encoding(spec: str, encoding: str) -> None:
    lines = draw_text(spec, encoding)
    assert len(lines) <= 10
    assert max(len(line) for line in lines) <= 80
    assert "\n".join(lines).encode(encoding)
    assert lines[-1].count(f"q = {TEACHER[0]}") == 2


def test_the_text_shows_the_curve() -> None:
    lines = draw_text("total_variation", "ascii")
    left = [line[10:39] for line in lines[1:8]]
    assert lines[1][:10].split() == ["0.58", "|"]
    assert lines[7][:10].split() == ["0", "|"]
    assert left[0].startswith("*")
    assert 16 <= left[-1].index("*") <= 17  # the minimum is at 0.6 of 29 columns
    for column in range(29):
        assert any(row.ljust(29)[column] == "*" for row in left)


def test_show_prints_the_plot_without_a_terminal_in_any_encoding() -> None:
    for encoding in ("utf-8", "ascii"):
        done = show("hellinger", PYTHONIOENCODING=encoding)
        assert done.returncode == 0
        text = done.stdout.decode(encoding)
        assert "gradient of the logit" in text
        assert f"Three tokens with teacher probabilities {TEACHER[0]}" in text
        assert "\x1b" not in text
        assert ("⠀" in text) == (encoding == "utf-8")


@pytest.mark.parametrize("suffix", [".png", ".svg", ".PNG"])
def test_show_writes_a_picture(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"plot{suffix}"
    done = show("generalized_jsd:beta=0.3", "--plot", file)
    assert done.returncode == 0, done.stderr
    assert f"{file} written" in done.stdout.decode()
    start = file.read_bytes()[:200]
    assert (
        start.startswith(PNG) if suffix.lower() == ".png" else b"<svg" in start or b"<?xml" in start
    )


def test_a_picture_is_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for file in files:
        write_plot("reverse_kl", file)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("plot.gif", "end in .png or .svg"),
        ("plot", "end in .png"),
        ("no/plot.png", "does not exist"),
    ],
)
def test_a_file_that_cannot_be_written_is_told_in_one_line(
    tmp_path: Path, name: str, reason: str
) -> None:
    done = show("forward_kl", "--plot", tmp_path / name)
    assert done.returncode == 2
    assert not done.stdout
    (line,) = done.stderr.decode().splitlines()
    assert reason in line
    assert not list(tmp_path.iterdir())


def test_a_sum_is_told_in_one_line() -> None:
    done = show("0.5*forward_kl+0.5*reverse_kl")
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert "is a sum" in line


def test_without_matplotlib_the_cure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'kdlosses\[plot\]'"):
        check_plot_file(Path("plot.png"))


def test_a_loss_that_cannot_be_drawn_is_shown_without_a_plot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kdlosses.losses.forward_kl import ForwardKL
    from kdrun.losses.show import print_loss

    def fails(loss: ForwardKL, teacher_log_probs: Any, student_log_probs: Any) -> Any:
        raise IndexError("needs more tokens")

    monkeypatch.setattr(ForwardKL, "integrand", fails)
    print_loss("forward_kl")
    printed = capsys.readouterr().out
    assert "curvature: 1.0" in printed
    assert "no plot: loss 'forward_kl' cannot be plotted" in printed
    assert "IndexError: needs more tokens" in printed
