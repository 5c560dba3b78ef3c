"""The stages of gpu.sh: the test suite, kdrun bench, and a run of random weights.

Each stage is a process with a limit of time; what fails is reported and does not stop the others.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
VERSIONS = ("kdlosses", "torch", "triton", "transformers", "peft", "liger-kernel", "trl")


@dataclass(frozen=True)
class Sizes:
    """What one command measures."""

    tests: tuple[str, ...]
    bench: tuple[str, ...]
    run: tuple[str, ...]
    limits: dict[str, int]


FULL = Sizes(
    ("tests/kdlosses", "tests/kdrun/training"),
    (
        *("--loss", "forward_kl", "--loss", "generalized_jsd", "--rounds", "20"),
        *("--tokens", "8192", "--vocab", "128256"),
        *("--student-width", "2048", "--teacher-width", "4096"),
    ),
    (),
    {"suite": 240, "bench": 180, "run": 170},
)
SMALL = Sizes(
    ("tests/kdlosses/test_numbers.py",),
    (
        *("--loss", "forward_kl", "--peer", "none", "--rounds", "2", "--tokens", "64"),
        *("--vocab", "512", "--student-width", "16", "--teacher-width", "32"),
    ),
    ("--small",),
    {"suite": 240, "bench": 180, "run": 170},
)


@dataclass
class Stage:
    """What became of a stage."""

    name: str
    command: list[str]
    status: str = "done"
    reason: str = ""
    seconds: float = 0.0
    result: Any = field(default_factory=dict)


def run_stage(name: str, command: list[str], limit: int, folder: Path) -> Stage:
    """Run a stage's process; its output is kept in a file of the stage's name."""
    stage = Stage(name, command)
    print(f"{name}: {' '.join(command)}", flush=True)
    started = time.perf_counter()
    log = folder / f"{name}.log"
    with open(log, "w", encoding="utf-8") as stream:
        # A group of its own, so that a stage that is stopped takes its processes with it.
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            stage.status, stage.reason = "failed", f"stopped after {limit} s"
        else:
            if code:
                lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                stage.status = "failed"
                stage.reason = f"exit code {code}: {lines[-1] if lines else ''}"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    stage.seconds = round(time.perf_counter() - started, 1)
    return stage


def suite(sizes: Sizes, device: str, folder: Path) -> Stage:
    """Run the tests on the device and count them."""
    report = folder / "suite.xml"
    command = [sys.executable, "-m", "pytest", "-q", "--device", device, "-m", "not distributed"]
    command += ["-p", "no:cacheprovider", f"--junitxml={report}", *sizes.tests]
    for needed in ("pytest", "hypothesis"):
        if importlib.util.find_spec(needed) is None:
            return Stage("suite", command, "skipped", f"{needed} is not installed")
    if importlib.util.find_spec("xdist") is not None and device != "cpu":
        command += ["-n", "8"]
    stage = run_stage("suite", command, sizes.limits["suite"], folder)
    if report.exists():
        cases = ElementTree.parse(report).getroot().iter("testcase")
        kinds = [{child.tag for child in case} for case in cases]
        failed = sum(bool(kind & {"failure", "error"}) for kind in kinds)
        skipped = sum("skipped" in kind for kind in kinds)
        stage.result = {
            "passed": len(kinds) - failed - skipped,
            "failed": failed,
            "skipped": skipped,
        }
    return stage


def bench(sizes: Sizes, device: str, folder: Path) -> Stage:
    """Measure losses, with the gradient's error against float64."""
    command = [sys.executable, "-m", "kdrun", "bench", "--device", device, "--dtype", "bfloat16"]
    command += ["--gradient-error", "--output", str(folder / "bench"), *sizes.bench]
    stage = run_stage("bench", command, sizes.limits["bench"], folder)
    table = folder / "bench" / "bench.csv"
    stage.result = {"not installed": absent_peers(), "rows": []}
    if table.exists():
        with open(table, encoding="utf-8", newline="") as stream:
            stage.result["rows"] = list(csv.DictReader(stream))
    return stage


def absent_peers() -> list[str]:
    """Tools that are compared where they are installed."""
    modules = {"torchtune": "torchtune", "liger": "liger_kernel", "trl": "trl"}
    return [name for name, module in modules.items() if importlib.util.find_spec(module) is None]


def whole_run(sizes: Sizes, folder: Path) -> Stage:
    """Train 20 steps with random weights of the sizes of Llama 3.1 8B and 3.2 1B."""
    scratch = folder / "run"
    command = [sys.executable, str(HERE / "gpu_run.py"), "--folder", str(scratch), *sizes.run]
    try:
        stage = run_stage("run", command, sizes.limits["run"], folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # the weights take 20 GB
    if stage.status == "done":
        stage.result = json.loads((folder / "run.log").read_text("utf-8").strip().splitlines()[-1])
    return stage


def environment(device: str) -> dict[str, Any]:
    """Versions, and the name of the device."""
    import torch

    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return {"device": name, "python": sys.version.split()[0], "versions": versions}


def markdown(found: dict[str, Any]) -> str:
    """The table of everything that was found."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [f"# {found['device']}", "", f"Python {found['python']}, {versions}.", ""]
    lines += ["| stage | status | seconds | result |", "|---|---|---|---|"]
    for stage in found["stages"]:
        result = stage["result"]
        said = ", ".join(f"{key} {show(value)}" for key, value in result.items() if key != "rows")
        status = f"{stage['status']}: {stage['reason']}" if stage["reason"] else stage["status"]
        lines.append(f"| {stage['name']} | {status} | {stage['seconds']:g} | {said} |")
    rows = [row for stage in found["stages"] for row in stage["result"].get("rows", ())]
    if rows:
        one = rows[0]
        lines += ["", f"{one['tokens']} tokens ({one['supervised_tokens']} supervised), vocabulary"]
        lines[-1] += f" {one['vocab']}, widths {one['student_width']} and {one['teacher_width']},"
        lines += [f"{one['dtype']}, forward and backward:", ""]
        lines += [
            "| loss | implementation | ms | / floor | peak MiB | error of the hidden gradient "
            "| error of the head gradient |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [bench_line(row) for row in rows]
    return "\n".join(lines) + "\n"


def show(value: object) -> str:
    """A value of a stage's result in a cell."""
    return ", ".join(value) or "none" if isinstance(value, list) else str(value)


def bench_line(row: dict[str, str]) -> str:
    """One line of the benchmark's table; empty cells where nothing was measured."""
    name = f"| {row['loss']} | {row['implementation']} |"
    if row["status"] != "measured":
        return f"{name} {row['status']}: {row['reason']} | | | | |"

    def cell(key: str, form: str, factor: float = 1.0) -> str:
        return format(factor * float(row[key]), form) if row[key] else ""

    cells = [cell("median_s", ".1f", 1000), cell("ratio_to_floor", ".2f"), cell("peak_mib", ".0f")]
    cells += [cell("hidden_grad_error", ".1e"), cell("weight_grad_error", ".1e")]
    return f"{name} {' | '.join(cells)} |"


def refusal(device: str) -> str | None:
    """Why nothing can be measured, or None."""
    for name, cure in (
        ("torch", "install it"),
        ("kdlosses", "add its wheel to --wheels (pip wheel --no-deps -w DIR .)"),
    ):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"{name} is not installed: {cure}"
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: torch finds no CUDA device here; try --device cpu --small"
    return None


def main() -> int:
    """Run the stages and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    reason = refusal(given.device)
    if reason is not None:
        print(f"gpu.sh: {reason}", file=sys.stderr)
        return 2
    sizes = SMALL if given.small else FULL
    stages = [
        suite(sizes, given.device, given.output),
        bench(sizes, given.device, given.output),
        whole_run(sizes, given.output),
    ]
    found = environment(given.device) | {"stages": [vars(stage) for stage in stages]}
    (given.output / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = markdown(found)
    (given.output / "gpu.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{given.output}: gpu.json, gpu.md")
    return int(any(stage.status == "failed" for stage in stages))


if __name__ == "__main__":
    sys.exit(main())
