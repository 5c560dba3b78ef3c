"""A server that fails in training: waited for, or given up and resumed, bit for bit either way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pretend import Fault, Model, Pretend
from runs import TOP_K, checkpoints, command, same_student, start, steps

from kdrun.training.progress import TokenRate

STATES = ["--set", "served.form=states"]
# Nine rows to train on in three steps of two micro-batches, two epochs, and three to evaluate on.
LONG = ["--set", "training.num_epochs=2", "--set", "training.gradient_accumulation_steps=2"]
LONG += ["--batch-size", "2", "--set", "served.concurrency=1"]
STEPS_OF_AN_EPOCH = 3
ROWS_OF_A_STEP = 4

Begin = Callable[..., list[object]]


@pytest.fixture(scope="module")
def few_rows(tiny_pair: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rows")
    lines = tiny_pair.rows.read_text().splitlines()
    for name, part in (("train", lines[:9]), ("eval", lines[20:23])):
        (folder / name).write_text("\n".join(part) + "\n")
    return {"train": folder / "train", "eval": folder / "eval"}


@pytest.fixture
def begin(tiny_pair: Any, few_rows: dict[str, Path], tmp_path: Path) -> Begin:
    """The arguments of a run of six steps with dropout and accumulation."""

    def arguments(server: Pretend, folder: Path, *more: object) -> list[object]:
        rows = (
            "--set",
            f"data.train={few_rows['train']}",
            "--set",
            f"data.eval={few_rows['eval']}",
        )
        found = start(tiny_pair, server.address, folder, *rows, *LONG, *more)
        where = found.index("--data")
        del found[where : where + 2]
        if "served.form=states" in more:
            found += ["--set", f"served.folder={server.states}"]
        return found

    return arguments


@pytest.fixture(scope="module")
def whole(
    tiny_pair: Any,
    few_rows: dict[str, Path],
    teacher_model: Model,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Undisturbed runs, by form."""
    folder = tmp_path_factory.mktemp("whole")
    return {"top_k": folder / "top_k", "states": folder / "states"}


@pytest.fixture
def undisturbed(
    whole: dict[str, Path],
    begin: Begin,
    pretend: Callable[..., Pretend],
    capsys: pytest.CaptureFixture[str],
) -> Callable[[str], Path]:
    def run(form: str, *more: object) -> Path:
        folder = whole[form].with_name("-".join([form, *map(str, more)]).replace("/", "_"))
        if not (folder / "summary.json").exists():
            options = TOP_K if form == "top_k" else STATES
            code, lines = command(capsys, *begin(pretend(), folder, *options, *more))
            assert code == 0, lines
        return folder

    return run


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, do: Callable[[], None]) -> None:
    """Do something when a step has ended."""
    ordinary = TokenRate.on_step_end

    def ended(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ordinary(self, args, state, control, **kwargs)
        if state.global_step == step:
            do()

    monkeypatch.setattr(TokenRate, "on_step_end", ended)


PASSING = [
    Fault("status", 429, retry_after="0.1"),
    Fault("status", 503, retry_after="Wed, 21 Oct 2026 07:28:00 GMT"),
    Fault("status", 500),
    Fault("hang", 3),
    Fault("close"),
    Fault("broken"),
    Fault("cut"),
    Fault("text", "no"),
    Fault("json", [1]),
    Fault("nan"),
    Fault("few"),
    Fault("foreign"),
    Fault("positions"),
    Fault("mass"),
    Fault("no_scores"),
]
PASSING_STATES = [
    Fault("status", 429),
    Fault("other_ids"),
    Fault("nan_states"),
    Fault("no_file"),
    Fault("failed"),
    Fault("outside"),
    Fault("short_states"),
    Fault("cut_file"),
]


@pytest.mark.parametrize(("form", "faults"), [("top_k", PASSING), ("states", PASSING_STATES)])
def test_what_passes_changes_nothing(
    form: str,
    faults: list[Fault],
    server: Pretend,
    begin: Begin,
    undisturbed: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every second answer is wrong, each in another way; no step uses one."""
    played = [one for fault in faults for one in (fault, Fault("none"))]
    server.begin(*played, spared=3)
    more = [*(TOP_K if form == "top_k" else STATES), "--set", "served.patience=60"]
    more += ["--set", "served.timeout=1"]
    code, lines = command(capsys, *begin(server, tmp_path / "run", *more))
    assert code == 0, lines
    assert not server.faults
    assert any("asking again" in line for line in lines)
    whole = undisturbed(form)
    assert same_student(tmp_path / "run", whole)
    assert steps(tmp_path / "run") == steps(whole)


GIVEN_UP = [
    ("top_k", Fault("status", 503), "is not ready (status 503)"),
    ("top_k", Fault("status", 429, retry_after="100"), "is not ready (status 429)"),
    ("top_k", Fault("status", 400), "refuses (status 400): not now"),
    ("top_k", Fault("status", 401), "KDRUN_API_KEY"),
    ("top_k", Fault("status", 404), "refuses (status 404)"),
    ("top_k", Fault("hang", 3), "does not answer within 0.4 s"),
    ("top_k", Fault("close"), "cannot be reached"),
    ("top_k", Fault("cut"), "cut off"),
    ("top_k", Fault("nan"), "log-probability nan"),
    ("top_k", Fault("few"), "7 of 8"),
    ("top_k", Fault("foreign"), "outside the vocabulary"),
    ("top_k", Fault("positions"), "positions of a prompt"),
    ("top_k", Fault("mass"), "add up to"),
    ("top_k", Fault("redirect", "http://elsewhere.invalid"), "not followed"),
    ("states", Fault("nan_states"), "not finite"),
    ("states", Fault("other_ids"), "another prompt"),
    ("states", Fault("no_file"), "served.folder"),
    ("states", Fault("no_states"), "no longer gives hidden states"),
]


@pytest.mark.parametrize(("form", "fault", "said"), GIVEN_UP, ids=lambda x: getattr(x, "kind", ""))
def test_what_stays_is_given_up_and_resumed(
    form: str,
    fault: Fault,
    said: str,
    server: Pretend,
    begin: Begin,
    undisturbed: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    # Three rows of the evaluation before, and those of two steps; the third step's first one fails.
    server.begin(forever=fault, spared=3 + 2 * ROWS_OF_A_STEP)
    more = [*(TOP_K if form == "top_k" else STATES)]
    if fault.kind in ("hang", "no_file"):
        more += ["--set", "served.timeout=0.4"]
    arguments = begin(server, folder, *more)
    code, lines = command(capsys, *arguments)
    assert code == 1, lines
    last = lines[-1]
    assert said in last
    assert f"the run was saved at step 2; continue with --resume --output {folder}" in last
    assert sum(line.startswith("kdrun: ") for line in lines) == 1
    assert checkpoints(folder) == [2]
    server.heal()
    code, lines = command(capsys, *arguments, "--resume")
    assert code == 0, lines
    whole = undisturbed(form)
    assert same_student(folder, whole)
    assert steps(folder) == steps(whole)


@pytest.mark.parametrize("done", range(6))
@pytest.mark.parametrize("form", ["top_k", "states"])
def test_every_step_can_be_the_one_that_fails(
    form: str,
    done: int,
    server: Pretend,
    begin: Begin,
    undisturbed: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first of the second epoch among them; nothing is asked ahead beyond the step."""
    monkeypatch.setattr("kdrun.served.teacher._ROWS_PER_REQUEST", 0)
    folder = tmp_path / "run"
    epochs, within = divmod(done, STEPS_OF_AN_EPOCH)
    server.begin(forever=Fault("status", 503), spared=3 + 9 * epochs + ROWS_OF_A_STEP * within)
    arguments = begin(server, folder, *(TOP_K if form == "top_k" else STATES))
    code, lines = command(capsys, *arguments)
    assert code == 1, lines
    assert "--resume" in lines[-1]
    assert ("no step was done" if done == 0 else f"saved at step {done};") in lines[-1]
    assert checkpoints(folder) == [done] * bool(done)
    server.heal()
    code, lines = command(capsys, *arguments, "--resume")
    assert code == 0, lines
    assert same_student(folder, undisturbed(form))
    assert steps(folder) == steps(undisturbed(form))


@pytest.mark.parametrize("place", ["before", "within", "after"])
def test_evaluations_can_fail(
    place: str,
    server: Pretend,
    begin: Begin,
    undisturbed: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kdrun.served.teacher._ROWS_PER_REQUEST", 0)
    folder = tmp_path / "run"
    in_training = ["--set", "training.eval_steps=2"] if place == "within" else []
    answered = {"before": 1, "within": 3 + 2 * ROWS_OF_A_STEP + 1, "after": 3 + 18 + 1}[place]
    server.begin(forever=Fault("status", 503), spared=answered)
    arguments = begin(server, folder, *TOP_K, *in_training)
    code, lines = command(capsys, *arguments)
    assert code == 1, lines
    assert f"--resume --output {folder}" in lines[-1]
    assert checkpoints(folder) == {"before": [], "within": [2], "after": [6]}[place]
    server.heal()
    code, lines = command(capsys, *arguments, "--resume")
    assert code == 0, lines
    assert same_student(folder, undisturbed("top_k", *in_training))


def test_saved_twice_is_saved_once(
    server: Pretend,
    begin: Begin,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    undisturbed: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A failure right after an ordinary checkpoint, and another right after resuming."""
    monkeypatch.setattr("kdrun.served.teacher._ROWS_PER_REQUEST", 0)
    folder = tmp_path / "run"
    arguments = begin(server, folder, *TOP_K, "--set", "training.save_steps=2")
    for done, rows in ((2, 3 + 8), (2, 0), (3, 1), (5, 8)):
        server.begin(forever=Fault("status", 503), spared=rows, spares_probe=True)
        resume = ["--resume"] if checkpoints(folder) else []
        code, lines = command(capsys, *arguments, *resume)
        assert code == 1, lines
        assert f"saved at step {done};" in lines[-1]
    server.heal()
    code, lines = command(capsys, *arguments, "--resume")
    assert code == 0, lines
    assert same_student(folder, undisturbed("top_k"))


def test_a_server_that_restarts_is_waited_for(
    server: Pretend,
    begin: Begin,
    undisturbed: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kdrun.served.teacher._ROWS_PER_REQUEST", 0)

    def restart() -> None:
        server.stop()
        threading.Timer(1.0, server.start).start()

    at_step(monkeypatch, 3, restart)
    more = (*TOP_K, "--set", "served.patience=20")
    code, lines = command(capsys, *begin(server, tmp_path / "run", *more))
    assert code == 0, lines
    assert any("cannot be reached" in line for line in lines)
    assert same_student(tmp_path / "run", undisturbed("top_k"))


@pytest.mark.parametrize("pause", [0.0, 1.0])
@pytest.mark.parametrize("form", ["top_k", "states"])
def test_a_server_that_restarts_with_another_model_is_refused(
    form: str,
    pause: float,
    server: Pretend,
    begin: Begin,
    undisturbed: Callable[..., Path],
    other_folder: Path,
    teacher_model: Model,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where it is back before anything is asked of it, so that no request ever failed."""
    folder = tmp_path / "run"
    monkeypatch.setattr("kdrun.served.teacher._ROWS_PER_REQUEST", 0)

    def restart() -> None:
        server.stop()
        server.model = Model(other_folder)
        if pause:
            threading.Timer(pause, server.start).start()
        else:
            server.start()

    options = [*(TOP_K if form == "top_k" else STATES)]
    with monkeypatch.context() as patch:
        at_step(patch, 3, restart)
        arguments = begin(server, folder, *options, "--set", "served.patience=20")
        code, lines = command(capsys, *arguments)
    assert code == 1, lines
    assert "has another model than before" in lines[-1]
    assert "saved at step 3;" in lines[-1]
    code, lines = command(capsys, *arguments, "--resume")
    assert code == 2, lines
    assert "the server has another teacher than when the run began" in lines[-1]
    for way in ("restore it", "another --output", "data.accept_changes=true"):
        assert way in lines[-1]
    server.model = teacher_model
    code, lines = command(capsys, *arguments, "--resume")
    assert code == 0, lines
    assert same_student(folder, undisturbed(form))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("done", [0, 3])
def test_a_run_that_waits_for_a_server_can_be_interrupted(
    name: str,
    done: int,
    server: Pretend,
    begin: Begin,
    undisturbed: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kdrun.served.teacher._ROWS_PER_REQUEST", 0)
    folder = tmp_path / "run"
    server.begin(forever=Fault("hang", 60), spared=3 + (0 if done == 0 else 9))
    arguments = begin(server, folder, *TOP_K)
    slow = ("--set", "served.timeout=60", "--set", "served.patience=60")
    sent: list[float] = []

    def send() -> None:
        while server.spared:
            time.sleep(0.05)
        time.sleep(0.7)  # by now the run waits
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.Signals[name])

    threading.Thread(target=send, daemon=True).start()
    code, lines = command(capsys, *arguments, *slow)
    assert time.monotonic() - sent[0] < 5
    assert code == 128 + signal.Signals[name], lines
    expected = "before the first step" if done == 0 else f"and saved at step {done}"
    assert lines[-1].startswith(f"kdrun: interrupted {expected}")
    assert f"--resume --output {folder}" in lines[-1]
    server.heal()
    code, lines = command(capsys, *arguments, "--resume")
    assert code == 0, lines
    assert same_student(folder, undisturbed("top_k"))
