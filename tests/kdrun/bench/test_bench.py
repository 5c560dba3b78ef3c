"""`kdrun bench`: real worker processes at tiny sizes, its files, and its exit codes."""

from __future__ import annotations

import csv
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from kdlosses import LossSpecError
from kdrun.bench import command, memory, plan, worker
from kdrun.bench.cases import CHUNKED, FLOOR, PLAIN, Case, Point, Settings
from kdrun.bench.measure import Measurement, _Worker, measure
from kdrun.bench.peers import PEERS, is_installed
from kdrun.bench.plan import Plan, make_plan
from kdrun.bench.report import print_tables, rows_of
from kdrun.bench.worker import Ready
from kdrun.cli import cli
from kdrun.errors import InputError

KDRUN = Path(sys.executable).with_name("kdrun")
SMALL = ("--tokens", 12, "--vocab", 40, "--student-width", 8, "--teacher-width", 6, "--rounds", 2)
SETTINGS = Settings(
    student_width=8,
    teacher_width=6,
    dtype="float32",
    device="cpu",
    threads=1,
    rounds=2,
    kd_ratio=0.5,
    chunk_size=None,
)
POINT = Point(tokens=12, vocab=40)
READY = Ready(
    first_call_s=0.5,
    loss=2.0,
    hidden_grad_norm=0.25,
    weight_grad_norm=0.5,
    chunk_size=None,
    threads=1,
    device=None,
    warnings=(),
)

PLUGIN = """
import os
from kdlosses import Divergence

class Dying(Divergence):
    def integrand(self, teacher_log_probs, student_log_probs):
        print("out of cheese", flush=True)
        os._exit(3)
"""


def kdrun(*arguments: object, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if path is not None:
        known = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(path), *([known] if known else [])])
    return subprocess.run(
        [KDRUN, "bench", *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment,
        timeout=280,
        check=False,
    )


def read_rows(folder: Path) -> list[dict[str, str]]:
    text = (folder / "bench.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text)))


def plan_for(folder: Path, **changes: Any) -> Plan:
    """A small plan of forward KL; settings may be changed."""
    return make_plan(replace(SETTINGS, **changes), [12], [40], ["forward_kl"], ["none"], folder)


def finished(implementation: str, spec: str = "forward_kl", **changes: Any) -> Measurement:
    """A measurement as if it had been done, twice as slow as the floor."""
    case = Case(SETTINGS, POINT, implementation, "" if implementation == FLOOR else spec)
    return Measurement(case, replace(READY, **changes), [0.2, 0.4], [0.1, 0.2], peak_mib=30.0)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A benchmark of a good loss, and of one from a plugin that ends the process."""
    plugin = tmp_path_factory.mktemp("plugin")
    (plugin / "dying.py").write_text(PLUGIN, encoding="utf-8")
    metadata = plugin / "dying-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: dying\nVersion: 1.2\n")
    (metadata / "entry_points.txt").write_text("[kdlosses.losses]\ndying = dying:Dying\n")
    folder = tmp_path_factory.mktemp("bench") / "new" / "folder"
    losses = ("--loss", "dying", "--loss", "forward_kl_chunked", "--peer", "none")
    return folder, kdrun(*losses, *SMALL, "--output", folder, path=plugin)


def test_a_worker_that_dies_is_a_row_and_the_others_are_measured(
    measured: tuple[Path, Any],
) -> None:
    folder, done = measured
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    rows = read_rows(folder)
    names = [(row["loss"], row["implementation"], row["status"]) for row in rows]
    assert names == [
        ("", "floor", "measured"),
        ("dying", "plain", "failed"),
        ("dying", "chunked", "failed"),
        ("forward_kl", "plain", "measured"),
        ("forward_kl", "chunked", "measured"),
    ]
    for row in rows[1:3]:
        assert row["reason"] == "ended with exit code 3: out of cheese"
        assert (row["distribution"], row["distribution_version"]) == ("dying", "1.2")
        assert not row["ratio_to_floor"]
    assert "dying plain: failed: ended with exit code 3: out of cheese" in done.stdout


def test_the_file_holds_figures_and_where_they_come_from(measured: tuple[Path, Any]) -> None:
    floor, *_, plain, chunked = read_rows(measured[0])
    assert float(floor["ratio_to_floor"]) == 1
    for row in (plain, chunked):
        low, middle, high = (
            float(row[key]) for key in ("ratio_lowest", "ratio_to_floor", "ratio_highest")
        )
        assert 0 < low <= middle <= high
        assert float(row["median_s"]) > 0
        assert float(row["first_call_s"]) > 0
        gradient = float(row["peak_mib"]) - float(row["peak_above_head_gradient_mib"])
        assert gradient == pytest.approx(40 * 8 * 4 / 2**20, rel=0.01)
        assert (row["tokens"], row["supervised_tokens"], row["vocab"]) == ("12", "9", "40")
        assert (row["dtype"], row["device"], row["rounds"]) == ("float32", "cpu", "2")
        for key in ("cpu_model", "threads", "torch", "python", "kdlosses"):
            assert row[key]
        assert row["differs"] == ""
    assert float(plain["loss_value"]) == pytest.approx(float(chunked["loss_value"]), rel=1e-5)
    assert float(plain["weight_grad_norm"]) == pytest.approx(
        float(chunked["weight_grad_norm"]), rel=1e-5
    )
    assert plain["chunk_size"] == ""
    assert int(chunked["chunk_size"]) > 0


def test_the_gradients_error_is_measured_against_float64(tmp_path: Path) -> None:
    from kdrun.bench.exact import gradient_errors
    from kdrun.bench.inputs import make_inputs

    point = Point(tokens=300, vocab=40)  # more rows than the reference takes at once
    case = Case(replace(SETTINGS, dtype="bfloat16", kd_ratio=1.0), point, PLAIN, "reverse_kl")
    inputs = make_inputs(case.settings, point)
    logits = inputs.hidden.double() @ inputs.weight.double().t()
    teacher = (inputs.teacher_hidden.double() @ inputs.teacher_weight.double().t()).log_softmax(-1)
    log_q = logits.log_softmax(-1)
    rows = (log_q.exp() * (log_q - teacher)).sum(-1)[inputs.labels != -100]
    hidden, weight = torch.autograd.grad(rows.mean(), (inputs.hidden, inputs.weight))
    hidden, weight = hidden.double(), weight.double()
    errors = gradient_errors(case, inputs, 1.25 * hidden, weight)
    assert errors.hidden == pytest.approx(0.25, rel=1e-2)
    assert 0 < errors.weight < 4e-3  # rounded to bfloat16 once

    changes: dict[str, Any] = {"dtype": "bfloat16", "gradient_error": True}
    assert command.bench(plan_for(tmp_path, **changes))
    floor, *measured = read_rows(tmp_path)
    assert floor["weight_grad_error"] == ""
    for row in measured:
        for key in ("hidden_grad_error", "weight_grad_error"):
            assert 1e-4 < float(row[key]) < 2e-2


def test_plots_are_images_that_name_the_losses(measured: tuple[Path, Any]) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    folder, done = measured
    height, width = imread(folder / "bench.png").shape[:2]
    assert width > height > 100
    tree = ElementTree.parse(folder / "bench.svg")
    assert tree.getroot().tag.endswith("svg")
    text = " ".join("".join(node.itertext()) for node in tree.iter() if node.tag.endswith("text"))
    for part in ("forward_kl", "chunked", "time / floor", "MiB"):
        assert part in text
    assert "dying" not in text
    assert {path.name for path in folder.iterdir()} == {"bench.csv", "bench.png", "bench.svg"}
    assert "bench.csv, bench.png, bench.svg" in done.stdout


def test_a_worker_that_is_killed_between_rounds_says_so(tmp_path: Path) -> None:
    started = _Worker(Case(SETTINGS, POINT, PLAIN, "forward_kl"), tmp_path)
    started.warm_up()
    assert started.time() is not None
    os.kill(started._process.pid, signal.SIGKILL)
    started._process.join()
    assert started.time() is None
    started.weigh()
    started.close()
    assert started.result.failed is not None
    assert started.result.failed.startswith("killed by SIGKILL, probably out of memory")


def test_what_does_not_fit_is_skipped_with_a_reason_and_is_no_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_plan(SETTINGS, [2], [10**12], ["forward_kl"], ["none"], tmp_path)
    assert command.bench(made)
    rows = read_rows(tmp_path)
    assert [row["status"] for row in rows] == ["skipped"] * 3
    for row in rows:
        assert "GiB are free" in row["reason"]
    assert "no loss was measured" in capsys.readouterr().out
    assert not (tmp_path / "bench.png").exists()


@pytest.mark.parametrize("implementation", [PLAIN, CHUNKED])
def test_only_stored_logits_are_refused_for_lack_of_memory(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(SETTINGS, Point(tokens=400, vocab=1000), implementation, "hellinger")
    bench = worker._Bench(case)
    monkeypatch.setattr(memory, "available", lambda device: 10**6)
    reason = bench.lacking()
    if implementation == CHUNKED:
        assert reason is None
        return
    assert reason is not None
    assert "GiB are free" in reason
    for free in (10**9, None):
        monkeypatch.setattr(memory, "available", lambda device, free=free: free)
        assert bench.lacking() is None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--loss", "forward_lk"), "did you mean 'forward_kl'"),
        (("--loss", "skew_forward_kl:alpha=2"), "less than 1"),
        (("--loss", "forward_kl:alpha=.2"), "no parameter 'alpha'"),
        (("--vocab", "1"), "--vocab 1: must be at least 2"),
        (("--tokens", "8", "--tokens", "0"), "--tokens 0: must be at least 1"),
        (("--student-width", "0"), "--student-width 0"),
        (("--teacher-width", "-1"), "--teacher-width -1"),
        (("--rounds", "0"), "--rounds 0"),
        (("--threads", "0"), "--threads 0"),
        (("--chunk-size", "0"), "--chunk-size 0"),
        (("--kd-ratio", "0"), "--kd-ratio 0"),
        (("--kd-ratio", "nan"), "--kd-ratio nan"),
        (("--kd-ratio", "1.5"), "--kd-ratio 1.5"),
        (("--peer", "none", "--peer", "trl"), "--peer none"),
        (("--output", "{file}"), "choose a writable folder"),
        (("--output", "{file}/below"), "choose a writable folder"),
    ],
)
def test_wrong_input_is_told_before_any_work(
    arguments: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    given = [argument.format(file=file) for argument in arguments]
    if "--output" not in given:
        given += ["--output", str(tmp_path / "made")]
    with pytest.raises((InputError, LossSpecError)) as caught:
        cli.main(["bench", *given], standalone_mode=False)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [file]


def test_wrong_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = kdrun("--loss", "forward_lk", "--output", tmp_path / "made")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


def test_cuda_is_refused_where_there_is_none(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(InputError, match="no CUDA device"):
        plan_for(tmp_path, device="cuda")


def test_peers_are_asked_only_for_what_they_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "is_installed", lambda name: name != "trl")
    losses = [
        "forward_kl",
        "reverse_kl_chunked",
        "generalized_jsd:beta=0.1",
        "generalized_jsd:normalize=true",
        "hellinger",
        "reverse_kl",
        "0.7*forward_kl_chunked + 0.3*skew_reverse_kl_chunked:alpha=0.2",
    ]
    made = make_plan(SETTINGS, [12], [40], losses, [], tmp_path)
    assert made.losses == {
        "forward_kl": ("torchtune", "liger"),
        "reverse_kl": ("torchtune", "liger"),
        "generalized_jsd:beta=0.1": ("liger",),
        "generalized_jsd:normalize=true": (),
        "hellinger": (),
        "0.7*forward_kl+0.3*skew_reverse_kl:alpha=0.2": (),
    }
    assert made.absent == ("trl",)
    betas = {loss: {case.beta for case in made.cases(POINT, loss)} for loss in made.losses}
    assert betas["reverse_kl"] == {1.0}
    assert betas["generalized_jsd:beta=0.1"] == {0.1}
    quick = make_plan(replace(SETTINGS, plain=False), [12], [40], losses, [], tmp_path)
    assert [case.implementation for case in quick.cases(POINT, "hellinger")] == [CHUNKED]
    with pytest.raises(InputError, match="pip install"):
        make_plan(SETTINGS, [12], [40], losses, ["trl"], tmp_path)


def test_specs_are_spelled_with_and_without_the_suffix() -> None:
    plain = "0.7*forward_kl+skew_reverse_kl:alpha=0.2"
    chunked = "0.7*forward_kl_chunked+skew_reverse_kl_chunked:alpha=0.2"
    for spec in (plain, chunked):
        assert plan.respell(spec, chunked=False) == plain
        assert plan.respell(spec, chunked=True) == chunked


def test_all_registered_losses_are_measured_by_default(tmp_path: Path) -> None:
    import kdlosses

    made = make_plan(SETTINGS, [12, 24, 12], [40, 50], [], ["none"], tmp_path)
    assert set(made.losses) == {ref.name for ref in kdlosses.available_losses()}
    assert made.points == (Point(12, 40), Point(12, 50), Point(24, 40), Point(24, 50))


@pytest.mark.parametrize(
    ("change", "flagged"),
    [
        ({}, ""),
        ({"loss": 2.001}, ""),
        ({"loss": 2.01}, "loss by 5.0e-03"),
        ({"weight_grad_norm": 0.6}, "head gradient by 2.0e-01"),
        ({"hidden_grad_norm": float("nan")}, "hidden gradient by inf"),
    ],
)
def test_results_that_differ_from_plain_are_flagged(change: dict[str, Any], flagged: str) -> None:
    rows = rows_of([finished(PLAIN), finished(CHUNKED, **change)])
    assert rows[0].differs == ""
    assert flagged in rows[1].differs
    assert bool(rows[1].differs) == bool(flagged)
    stream = io.StringIO()
    print_tables(rows, Console(file=stream, width=100))
    assert ("chunked *" in stream.getvalue()) == bool(flagged)


def test_only_the_gradients_of_a_forward_kl_without_entropy_are_compared() -> None:
    peer = finished("torchtune")
    assert peer.ready is not None
    peer.ready = replace(peer.ready, loss=9.0)
    assert rows_of([finished(PLAIN), peer])[1].differs == ""
    peer.case = replace(peer.case, beta=1.0)
    assert "loss" in rows_of([finished(PLAIN), peer])[1].differs


def test_ratios_are_medians_over_rounds_of_the_same_round() -> None:
    result = finished(PLAIN)
    result.seconds, result.floor_seconds = [1.0, 9.0, 4.0], [1.0, 3.0, 2.0]
    [row] = rows_of([result])
    assert (row.ratio_lowest, row.ratio_to_floor, row.ratio_highest) == (1, 2, 3)


def test_without_matplotlib_the_rest_is_done_and_the_cure_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    def measurements(*_: object) -> Iterator[list[Measurement]]:
        yield [finished(PLAIN), replace(finished(CHUNKED), peak_mib=10.0)]
        yield [finished(FLOOR)]

    monkeypatch.setattr(command, "measure", measurements)
    assert command.bench(plan_for(tmp_path))
    printed = capsys.readouterr().out
    assert "pip install 'kdlosses[plot]'" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["bench.csv"]
    assert [row["peak_ratio_to_plain"] for row in read_rows(tmp_path)] == ["", "1", "0.333333"]


def test_the_same_rows_give_the_same_drawing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from kdrun.bench.plot import draw

    losses = ("forward_kl", "generalized_jsd:beta=0.1", "a_loss_with_a_rather_long_name")
    rows = [
        row
        for loss in losses
        for row in rows_of([finished(PLAIN, loss), finished(CHUNKED, loss), finished("trl", loss)])
    ]
    rows += [replace(row, tokens=99, peak_mib=None) for row in rows]
    drawn = []
    for _ in range(2):
        draw(rows, tmp_path)
        drawn.append((tmp_path / "bench.svg").read_bytes())
    assert drawn[0] == drawn[1]
    assert b"99 tokens, vocabulary 40" in drawn[0]


def test_nothing_is_drawn_where_the_floor_alone_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = replace(finished(PLAIN), failed="OutOfMemoryError: [too] large")
    results = [[failed], [finished(FLOOR)]]
    monkeypatch.setattr(command, "measure", lambda *_: (result for result in results))
    assert not command.bench(plan_for(tmp_path))
    printed = capsys.readouterr().out
    assert "failed: OutOfMemoryError: [too] large" in printed
    assert "no loss was measured" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "vocab"),
    [("float32", 2048), ("bfloat16", 200), ("float16", 200)],  # 2048 is compiled
)
def test_chunks_agree_with_plain(dtype: str, vocab: int, tmp_path: Path) -> None:
    settings = replace(SETTINGS, dtype=dtype, student_width=32, teacher_width=48, chunk_size=16)
    made = make_plan(settings, [64], [vocab], ["generalized_jsd"], ["none"], tmp_path)
    [plain, chunked], [floor] = measure(made, lambda text: None)
    assert floor.measured
    for row in rows_of([plain, chunked]):
        assert (row.status, row.differs, row.reason) == ("measured", "", "")
    assert chunked.ready is not None
    assert chunked.ready.chunk_size == 16


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_peers_agree_with_plain(name: str, tmp_path: Path) -> None:
    if not is_installed(name):
        pytest.skip(f"{PEERS[name].distribution} is not installed")
    # One loss: each takes three processes, and tests/parity has the others.
    loss = "forward_kl" if name == "torchtune" else "generalized_jsd:beta=0.2"
    settings = replace(SETTINGS, kd_ratio=0.3)
    made = make_plan(settings, [20], [50], [loss], [name], tmp_path)
    result, _ = measure(made, lambda text: None)
    rows = rows_of(result)
    assert [row.implementation for row in rows] == ["plain", "chunked", name]
    assert all((row.status, row.differs) == ("measured", "") for row in rows)
