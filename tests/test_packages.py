"""The page of packages is made from metadata alone."""

import importlib.util
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "docs" / "packages.py"


@pytest.fixture(scope="module")
def packages():
    spec = importlib.util.spec_from_file_location("packages_page", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made(folder, name, entries, more=""):
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir(parents=True)
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\nSummary: About | it\n{more}"
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    (info / "entry_points.txt").write_text(entries, encoding="utf-8")
    return Distribution.at(info)


def test_it_lists_what_a_package_registers_without_importing_it(packages, tmp_path):
    made(
        tmp_path,
        "kd_more",
        "[kdlosses.losses]\nb = nowhere:B\na = nowhere:A\n[kdlosses.weights]\nw = nowhere:W\n"
        "[kdrun.procedures]\np = nowhere:P\n[console_scripts]\nx = nowhere:x\n",
        "License-Expression: MIT\nProject-URL: Homepage, https://example.org/more\n",
    )
    made(tmp_path, "other", "[console_scripts]\nx = nowhere:x\n")
    lines = packages.page(distributions(path=[str(tmp_path)])).splitlines()
    assert lines[-1] == (
        "| [kd_more 1.2](https://example.org/more) | losses `a`, `b`; token weights `w`; "
        "procedures `p` | About \\| it | MIT |"
    )
    assert not any("other" in line for line in lines)


def test_the_first_of_a_name_on_the_path_is_the_one(packages, tmp_path):
    first = made(tmp_path / "1", "kd-more", "[kdlosses.losses]\nnew = nowhere:B\n")
    second = made(tmp_path / "2", "KD_more", "[kdlosses.losses]\nold = nowhere:B\n")
    text = packages.page([first, second])
    assert "`new`" in text
    assert "`old`" not in text


def test_a_link_is_only_a_link(packages, tmp_path):
    home = "Project-URL: Homepage, javascript:alert(1)\nHome-page: http://example.org\n"
    found = made(tmp_path, "odd", "[kdlosses.losses]\na = nowhere:A\n", home)
    assert "| odd 1.2 |" in packages.page([found])


def test_the_built_in_losses_are_on_it(packages):
    assert "`forward_kl`" in packages.page()
