"""`kdrun losses new`: what it writes installs and passes its own tests."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from kdrun.cli import cli
from kdrun.errors import InputError
from kdrun.losses.new import _range, new_loss


def run(*command: object, cwd: Path, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"},
        timeout=280,
        check=False,
    )


@pytest.mark.parametrize("group", ["losses", "weights", "features"])
def test_a_new_package_installs_and_passes_its_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], group: str
) -> None:
    monkeypatch.chdir(tmp_path)
    cli.main([group, "new", "my_divergence"], standalone_mode=False)
    folder = Path("kdlosses-my-divergence").absolute()
    assert "kdlosses-my-divergence" in capsys.readouterr().out
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert written == {
        ".github/workflows/tests.yml",
        "README.md",
        "pyproject.toml",
        "src/kdlosses_my_divergence/__init__.py",
        "src/kdlosses_my_divergence/py.typed",
        "tests/test_my_divergence.py",
    }
    installed = tmp_path / "installed"
    pip = ("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index")
    done = run(*pip, "--target", installed, folder, cwd=tmp_path, path=installed)
    assert done.returncode == 0, done.stderr
    done = run("-m", "pytest", "-q", "-W", "error", cwd=folder, path=installed)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
    find = {"losses": "find_loss", "weights": "find_weight", "features": "find_feature"}[group]
    listing = f"import kdlosses; print(kdlosses.{find}('my_divergence').distribution)"
    done = run("-c", listing, cwd=tmp_path, path=installed)
    assert done.stdout.strip() == "kdlosses-my-divergence"


FIRST_TRY = '''
from kdlosses import Divergence


class Squares(Divergence):
    """Squared distance, sum (p - q)^2.

    Reference: none.
    """

    def integrand(self, teacher_log_probs, student_log_probs):
        return (teacher_log_probs.exp() - student_log_probs.exp()) ** 2
'''


def test_a_first_try_becomes_a_package_that_passes_its_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_loss.py").write_text(FIRST_TRY, encoding="utf-8")
    source = ["--from", "my_loss.py:Squares"]
    cli.main(["losses", "new", "squares", *source], standalone_mode=False)
    folder = Path("kdlosses-squares").absolute()
    assert (folder / "src/kdlosses_squares/__init__.py").read_text(encoding="utf-8") == FIRST_TRY
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"] == {"kdlosses.losses": {"squares": "kdlosses_squares:Squares"}}
    major, minor = version("kdlosses").split(".")[:2]
    assert project["dependencies"] == [f"kdlosses>={major}.{minor},<{major}.{int(minor) + 1}"]
    steps = yaml.safe_load((folder / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    runs = [step.get("run") for step in steps["jobs"]["tests"]["steps"]]
    assert runs[-2:] == ["pytest", "kdrun losses check squares --json"]
    installed = tmp_path / "installed"
    pip = ("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index")
    done = run(*pip, "--target", installed, folder, cwd=tmp_path, path=installed)
    assert done.returncode == 0, done.stderr
    done = run("-m", "pytest", "-q", "-W", "error", cwd=folder, path=installed)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("forward_kl", "expected FILE.py:CLASS"),
        ("my_loss.py:Squares_chunked", "expected FILE.py:CLASS"),
        ("my_loss.py:Squares+forward_kl", "expected FILE.py:CLASS"),
        ("my_loss.py:Square", "did you mean 'Squares'"),
        ("none.py:Square", "there is no file none.py"),
    ],
)
def test_what_is_no_loss_of_a_file_makes_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_loss.py").write_text(FIRST_TRY, encoding="utf-8")
    with pytest.raises(InputError, match=reason):
        new_loss("squares", "made", source)
    assert not Path("made").exists()


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ("0.1.0", ">=0.1,<0.2"),
        ("0.12.3rc1", ">=0.12,<0.13"),
        ("2.4", ">=2.4,<3"),
        ("1", ">=1.0,<2"),
    ],
)
def test_the_range_ends_before_the_next_interface(installed: str, expected: str) -> None:
    assert _range(installed) == expected


@pytest.mark.parametrize("name", ["my_divergence", "a_longer_name_than_most_losses_have"])
def test_what_is_written_is_formatted(name: str, tmp_path: Path) -> None:
    pytest.importorskip("ruff")
    folder = new_loss(name, str(tmp_path / "made"))
    project = Path(__file__).parents[3] / "pyproject.toml"
    tests = ("--extend-per-file-ignores", "*/tests/*:D1")
    for command in (["check", *tests], ["format", "--check"]):
        done = run("-m", "ruff", *command, "--config", project, folder, cwd=tmp_path, path=tmp_path)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("forward_kl", "already registered by kdlosses"),
        ("mine_chunked", "use 'mine'"),
        ("_chunked", "lower-case"),
        ("My_Loss", "lower-case"),
        ("my-loss", "lower-case"),
        ("2fast", "lower-case"),
        ("ends_", "lower-case"),
        ("../up", "lower-case"),
        ("", "lower-case"),
    ],
)
def test_unusable_names_are_refused(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=reason):
        new_loss(name, str(tmp_path / "made"))
    assert not any(tmp_path.iterdir())


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists"):
        new_loss("my_divergence", str(tmp_path))


@pytest.mark.parametrize("name", ["none", "tensor", "divergence", "my_loss", "field"])
def test_class_names_clash_with_nothing(name: str, tmp_path: Path) -> None:
    folder = new_loss(name, str(tmp_path / "made"))
    [source] = folder.glob("src/*/__init__.py")
    compile(source.read_text(encoding="utf-8"), str(source), "exec")
