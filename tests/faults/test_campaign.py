"""A short campaign of faults; the long one, with its figures, is in docs/reliability.md."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).with_name("campaign.py")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux's"),
]


def strike(tmp_path: Path, *arguments: str) -> dict[str, object]:
    report = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, CAMPAIGN, *arguments, "--report", report],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "KDRUN_FAULTS"},
        timeout=500,
        check=False,
    )
    assert report.is_file(), done.stderr
    figures: dict[str, object] = json.loads(report.read_text(encoding="utf-8"))
    return figures


@pytest.mark.parametrize(
    ("scenario", "mode", "every"),
    [
        ("train", "kill", 37),
        ("resume", "kill", 31),
        ("merge", "kill", 59),
        ("cache", "kill", 11),
        ("cache-resume", "kill", 5),
        ("cache-resume", "full", 7),
        ("evaluate", "kill", 2),
        ("compare", "kill", 97),
        ("train", "full", 47),
        ("cache", "full", 13),
        ("resume", "read-only", 47),
        ("resume", "vanish", 29),
        ("train", "no-locks", 1),
    ],
)
def test_what_is_struck_and_repeated_ends_as_undisturbed(
    tmp_path: Path, scenario: str, mode: str, every: int
) -> None:
    figures = strike(tmp_path, scenario, mode, "--every", str(every), "--first", "3")
    assert figures["wrong"] == []
    assert figures["faults"] == figures["recovered"]
    assert figures["faults"] >= (1 if mode == "no-locks" else 2)


def test_two_jobs_killed_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    figures = strike(tmp_path, "compare-2", "moments", "--count", "2", "--seed", "4")
    assert figures["wrong"] == []
    assert figures["recovered"] == 2
