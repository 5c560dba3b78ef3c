"""``docs/benchmarks/gpu.sh``, with small sizes on the CPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMAND = ROOT / "docs" / "benchmarks" / "gpu.sh"
OF_THE_MACHINE = {"torch", "triton", "numpy"}


def gpu(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        timeout=280,
        check=False,
    )


def write_wheel(folder: Path) -> None:
    """A wheel of one module, as pip takes it."""
    folder.mkdir()
    info = "planted-1.0.dist-info"
    files = {
        "planted.py": "VALUE = 7\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(folder / "planted-1.0-py3-none-any.whl", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


@pytest.mark.slow
def test_every_stage_runs_with_small_sizes_and_wheels_are_installed(tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels")
    output = tmp_path / "out"
    options = ("--device", "cpu", "--small", "--wheels", tmp_path / "wheels")
    done = gpu(*options, "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (output / "site" / "planted.py").exists()
    found = json.loads((output / "gpu.json").read_text(encoding="utf-8"))
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert [stage["status"] for stage in found["stages"]] == ["done"] * 3
    assert stages["suite"]["result"]["passed"] > 100
    assert stages["suite"]["result"]["failed"] == 0
    names = [row["implementation"] for row in stages["bench"]["result"]["rows"]]
    assert names == ["floor", "plain", "chunked"]
    for row in stages["bench"]["result"]["rows"][1:]:
        assert 0 < float(row["weight_grad_error"]) < 2e-2
    assert stages["run"]["result"]["steps"] == 19  # the first one is not timed
    table = (output / "gpu.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^\| forward_kl \| \w+ \| [\d.]+ \|", table, re.MULTILINE)) == 2
    assert not (output / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "--output DIR is needed"),
        (("--output",), "--output needs a value"),
        (("--fast",), "unknown option --fast"),
        (("--output", "{}/out", "--wheels", "{}/none"), "not a folder"),
        (("--output", "{}/out", "--wheels", "{}"), "contains no wheels"),
    ],
)
def test_wrong_input_is_one_line(tmp_path: Path, arguments: tuple[str, ...], reason: str) -> None:
    done = gpu(*(argument.format(tmp_path) for argument in arguments))
    assert done.returncode == 2
    assert done.stderr.startswith("gpu.sh: ")
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_list_of_wheels_is_complete() -> None:
    """Whatever the listed packages need is listed, or the machine's."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (COMMAND.parent / "gpu-wheels.txt").read_text(encoding="utf-8").splitlines()
    listed = {canonicalize_name(line) for line in lines if line and not line.startswith("#")}
    missing = set()
    for name in listed:
        try:
            needed = map(Requirement, requires(name) or ())
        except PackageNotFoundError:
            continue  # an optional package that is absent here
        missing |= {
            canonicalize_name(requirement.name)
            for requirement in needed
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        }
    assert missing - listed <= OF_THE_MACHINE
    assert len(listed) > 30
