"""Servers and runs in processes of their own: kill -9, signals, the key, several processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import heed_interrupts, kdrun, kdrun_in_processes
from pretend import Fault, Pretend
from runs import TOP_K, checkpoints, command, same_student, start, steps, student

from kdrun.training.progress import TokenRate

MARKER = "MARKER-0123456789"
SCRIPT = Path(__file__).with_name("pretend.py")


class Process:
    """A server that can be killed."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        self._folder = folder
        self._process = self._begin(port)
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        self._port = int(self.address.rpartition(":")[2])

    def _begin(self, port: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, SCRIPT, str(self._folder), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def again(self) -> None:
        self._process = self._begin(self._port)


@pytest.fixture
def process(tiny_pair: Any) -> Iterator[Process]:
    found = Process(tiny_pair.teacher)
    yield found
    found.kill()


@pytest.mark.slow
def test_a_killed_server_that_comes_back_is_waited_for(
    process: Process,
    tiny_pair: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    more = (*TOP_K, "--max-steps", 12, "--set", "served.patience=60")
    whole = start(tiny_pair, process.address, tmp_path / "whole", *more)
    assert command(capsys, *whole)[0] == 0
    ordinary = TokenRate.on_step_end

    def ended(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ordinary(self, args, state, control, **kwargs)
        if state.global_step == 4:
            process.kill()
            process.again()

    monkeypatch.setattr(TokenRate, "on_step_end", ended)
    code, lines = command(capsys, *start(tiny_pair, process.address, tmp_path / "run", *more))
    assert code == 0, lines
    assert any("cannot be reached" in line for line in lines)
    assert same_student(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_server_that_stays_away_ends_the_run_saved(
    process: Process, tiny_pair: Any, tmp_path: Path
) -> None:
    """While requests are on their way, whenever that is."""
    more = (*TOP_K, "--max-steps", 2000, "--set", "training.save_steps=2000")
    metrics = tmp_path / "run" / "metrics.jsonl"

    def kill() -> None:
        while not metrics.is_file() or metrics.read_text().count("\n") < 20:
            time.sleep(0.1)
        process.kill()

    threading.Thread(target=kill, daemon=True).start()
    done = kdrun(*start(tiny_pair, process.address, tmp_path / "run", *more))
    process.again()
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("kdrun: ")]
    assert len(lines) == 1
    (step,) = checkpoints(tmp_path / "run")
    assert f"saved at step {step};" in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_process_does_not_wait_for_its_threads(
    name: str, server: Pretend, tiny_pair: Any, tmp_path: Path
) -> None:
    """The server hangs for longer than the test may last."""
    server.begin(forever=Fault("hang", 300), spared=2 + 16)
    folder = tmp_path / "run"
    more = (*TOP_K, "--max-steps", 9, "--set", "served.timeout=300", "--set", "served.patience=300")
    with subprocess.Popen(
        [sys.executable, "-m", "kdrun", *map(str, start(tiny_pair, server.address, folder, *more))],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    ) as process:
        while server.spared:
            time.sleep(0.1)
        time.sleep(1.5)
        began = time.monotonic()
        process.send_signal(signal.Signals[name])
        assert process.stderr is not None
        rest = process.stderr.read()
        process.wait()
    assert time.monotonic() - began < 10
    assert process.returncode == 128 + signal.Signals[name], rest
    (step,) = checkpoints(folder)  # which rows were answered is a matter of luck
    assert 0 < step <= 4
    assert f"interrupted and saved at step {step};" in rest.splitlines()[-1]


@pytest.fixture
def keyed(monkeypatch: pytest.MonkeyPatch, pretend: Callable[..., Pretend]) -> Pretend:
    monkeypatch.setenv("KDRUN_API_KEY", MARKER)
    return pretend(key=MARKER)


def files_with(folder: Path, text: str) -> list[Path]:
    return [one for one in folder.rglob("*") if one.is_file() and text.encode() in one.read_bytes()]


@pytest.mark.slow
def test_the_key_stands_nowhere(keyed: Pretend, tiny_pair: Any, tmp_path: Path) -> None:
    """In a run that fails, one that goes on, and one whose key is wrong."""
    folder = tmp_path / "run"
    more = (*TOP_K, "--max-steps", 4, "--set", "training.report_to=tensorboard")
    arguments = start(tiny_pair, keyed.address, folder, *more)
    keyed.begin(forever=Fault("text", f'{{"error": "{MARKER}"}}'), spared=2 + 8)
    failed = kdrun(*arguments, KDRUN_API_KEY=MARKER)
    assert failed.returncode == 1, failed.stderr
    keyed.heal()
    done = kdrun(*arguments, "--resume", KDRUN_API_KEY=MARKER)
    assert done.returncode == 0, done.stderr
    wrong = start(tiny_pair, keyed.address, tmp_path / "wrong", *more)
    refused = kdrun(*wrong, KDRUN_API_KEY=f"{MARKER}-wrong")
    assert refused.returncode == 2, refused.stderr
    assert "KDRUN_API_KEY" in refused.stderr
    for one in (failed, done, refused):
        assert MARKER not in one.stdout + one.stderr
    assert files_with(tmp_path, MARKER) == []
    seen = {one.headers.get("authorization") for one in keyed.requests}
    assert seen == {f"Bearer {MARKER}", f"Bearer {MARKER}-wrong"}


def test_the_key_is_in_no_process_title(
    keyed: Pretend, tiny_pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (*TOP_K, "--max-steps", 1)
    code, lines = command(capsys, *start(tiny_pair, keyed.address, tmp_path / "run", *more))
    assert code == 0, lines
    for name in ("cmdline", "comm"):
        assert MARKER.encode() not in Path("/proc/self", name).read_bytes()
    assert MARKER not in json.dumps(sys.argv)
    assert files_with(tmp_path, MARKER) == []


def test_no_run_folder_names_the_key_variable_with_its_value(
    pretend: Callable[..., Pretend], tiny_pair: Any, tmp_path: Path, capsys: Any
) -> None:
    """A key in the address is refused before it could be recorded."""
    address = pretend().address.replace("http://", f"http://user:{MARKER}@")
    code, lines = command(capsys, *start(tiny_pair, address, tmp_path / "run", *TOP_K))
    assert code == 2
    assert MARKER not in "\n".join(lines)
    assert files_with(tmp_path, MARKER) == []


TWO = [
    "--set",
    "training.gradient_accumulation_steps=2",
    "--max-steps",
    4,
]  # whole batches: an epoch of 38 rows has five


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("form", ["top_k", "states"])
def test_two_processes_are_one_run(
    form: str,
    server: Pretend,
    tiny_pair: Any,
    still_student: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [*TOP_K, *TWO, "--student", still_student]
    if form == "states":
        options += ["--set", "served.form=states", "--set", f"served.folder={server.states}"]
    alone = start(tiny_pair, server.address, tmp_path / "one", *options)
    code, lines = command(capsys, *alone, "--batch-size", 4)
    assert code == 0, lines
    shared = start(tiny_pair, server.address, tmp_path / "two", *options)
    for done in kdrun_in_processes(2, *shared, "--batch-size", 2):
        assert done.returncode == 0, done.stderr[-3000:]
    for line, same in zip(steps(tmp_path / "one"), steps(tmp_path / "two"), strict=True):
        for name in ("class_loss", "kd_loss", "grad_norm", "eval_events_forward_kl"):
            if name in line:
                assert same[name] == pytest.approx(line[name], rel=1e-5), name
    ours, theirs = student(tmp_path / "one"), student(tmp_path / "two")
    for name, weight in ours.items():  # Adam makes steps of rounding where gradients are small
        assert (theirs[name] - weight).abs().max() <= 5e-5, name


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_up_together_and_go_on_together(
    server: Pretend, tiny_pair: Any, tmp_path: Path
) -> None:
    """One row fails, which only one of them waits for."""
    options = [*TOP_K, *TWO, "--batch-size", 2, "--set", "served.concurrency=2"]
    whole = start(tiny_pair, server.address, tmp_path / "whole", *options)
    for done in kdrun_in_processes(2, *whole):
        assert done.returncode == 0, done.stderr[-3000:]
    run = start(tiny_pair, server.address, tmp_path / "run", *options)
    server.begin(Fault("status", 400), spared=2 + 24)
    for done in kdrun_in_processes(2, *run):
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
    (step,) = checkpoints(tmp_path / "run")
    assert 0 < step < 4
    server.heal()
    for done in kdrun_in_processes(2, *run, "--resume"):
        assert done.returncode == 0, done.stderr[-3000:]
    assert same_student(tmp_path / "run", tmp_path / "whole")
