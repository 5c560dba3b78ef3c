"""A distribution of broken losses, installed by pip: it breaks nothing but itself."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FIXTURE = Path(__file__).parents[2] / "fixtures" / "kdlosses-broken"
KDRUN = Path(sys.executable).with_name("kdrun")
BROKEN = {
    "broken_import": "ImportError: no module that this loss needs",
    "broken_exit": "SystemExit: usage: exits FILE",
    "broken_attribute": "AttributeError",
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of a process that sees the installed distribution."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools, which builds the fixture, is not installed")
    folder = tmp_path_factory.mktemp("broken")
    source = shutil.copytree(FIXTURE, folder / "source")  # a build leaves files in its source
    options = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", folder / "site", source],
        check=True,
    )
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(folder / "site"), *([inherited] if inherited else [])])
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "400"}


def kdrun(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [KDRUN, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment,
        timeout=280,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done


def test_help_and_list_do_not_import_it(environment: dict[str, str]) -> None:
    assert kdrun(environment, "--help").returncode == 0
    done = kdrun(environment, "losses", "list")
    assert done.returncode == 0
    rows = [line.split() for line in done.stdout.splitlines()]
    for name in BROKEN:
        assert [name, "kdlosses-broken"] in rows
    assert ["forward_kl", "kdlosses"] in rows
    assert ["total_variation", "kdlosses"] in rows
    (ignored,) = [row for row in rows if row[:2] == ["total_variation", "kdlosses-broken"]]
    assert ignored[2] == "ignored:"


def test_a_built_in_name_that_it_claims_is_used_and_said(environment: dict[str, str]) -> None:
    done = kdrun(environment, "losses", "list", "--details")
    assert (
        "total_variation  kdlosses-broken  ignored: the name belongs to a built-in" in done.stdout
    )
    code = (
        "from kdrun.losses.build import notes_on_names; "
        "print(*notes_on_names('0.5*total_variation+hellinger'))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    ).stdout
    assert "total_variation: the built-in loss is used" in said
    assert "kdlosses-broken" in said


def test_details_say_what_is_broken_and_show_the_rest(environment: dict[str, str]) -> None:
    done = kdrun(environment, "losses", "list", "--details")
    assert done.returncode == 0
    entries = {entry.split()[0]: entry for entry in re.split(r"\n(?! )", done.stdout) if entry}
    for name, reason in BROKEN.items():
        assert entries[name].split()[2] == "broken"
        assert reason in entries[name]
    assert "beta=0.5" in entries["generalized_jsd"]


@pytest.mark.slow
def test_checking_all_counts_it_as_failed_and_checks_the_rest(environment: dict[str, str]) -> None:
    done = kdrun(environment, "losses", "check", "--all")
    assert done.returncode == 1
    for name in BROKEN:
        assert f"{name}: broken: " in done.stdout
    assert "hellinger: passed" in done.stdout


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("broken_exit", ("--loss", "broken_exit_chunked")),
        ("broken_import", ("losses", "show", "broken_import")),
        ("broken_exit", ("losses", "check", "broken_exit")),
        ("broken_attribute", ("losses", "show", "broken_attribute")),
    ],
)
def test_using_it_names_its_distribution(
    environment: dict[str, str], name: str, arguments: tuple[str, ...]
) -> None:
    done = kdrun(environment, *arguments)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert "'kdlosses-broken'" in line
    assert BROKEN[name] in line
