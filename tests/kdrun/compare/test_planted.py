"""Real trials with a known outcome: identical, worse, and the same on Ray workers that die."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click import UsageError
from small import compare, records, refused, rows_file

from kdrun.compare.cluster import check_address, check_room
from kdrun.compare.plan import find_yardstick
from kdrun.compare.record import Record
from kdrun.errors import InputError

for package in ("scipy", "matplotlib", "jinja2"):
    pytest.importorskip(package)

PLANTED = Path(__file__).parents[2] / "fixtures" / "planted"


LOSSES = ("forward_kl_chunked", "planted_twin_chunked", "planted_still_chunked")


@pytest.fixture(scope="module")
def struck(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The planted losses are installed; the file that remembers that the lethal one has struck."""
    file = tmp_path_factory.mktemp("lethal") / "struck"
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(PLANTED), *([inherited] if inherited else [])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)  # for other processes
        patch.setenv("KDLOSSES_PLANTED", str(file))
        patch.syspath_prepend(PLANTED)
        yield file


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    rows = rows_file(tmp_path_factory.mktemp("rows"))
    return ("--data", rows, "--kd-ratio", 1, "--set", "optimizer.warmup_steps=0")


@pytest.fixture(scope="module")
def serial(
    struck: Path, given: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Record], str]:
    """Twelve trials in this process, and what was printed."""
    folder = tmp_path_factory.mktemp("serial") / "c"
    losses = [word for loss in LOSSES for word in ("--loss", loss)]
    printed = compare(*losses, *given, "--seeds", 3, "--output", folder)
    return read(folder), printed


def read(folder: Path) -> list[Record]:
    return [Record.model_validate(record) for record in records(folder).values()]


@pytest.mark.slow
def test_two_names_of_a_loss_are_identical_and_one_without_a_gradient_is_worse(
    serial: tuple[list[Record], str],
) -> None:
    from kdrun.compare.verdicts import compare_all

    found, printed = serial
    assert len(found) == 12
    assert {record.status for record in found} == {"done"}
    lines = [line.split() for line in printed.splitlines()]
    (verdict,) = [line for line in lines if "3/3" in line and line[0] == LOSSES[2]]
    assert "worse:" in verdict
    # The two names are compared with each other, not with the baseline of the command.
    arms = {record.trial.arm.loss: record.trial.arm for record in found}
    first, twin = arms[LOSSES[0]], arms[LOSSES[1]]
    for name in ("ce", "forward_kl"):
        judged = compare_all(found, first, find_yardstick(name), 0.02, [first, twin])
        assert {verdict.arm: verdict.verdict for verdict in judged}[twin] == "identical", name


@pytest.mark.slow
@pytest.mark.distributed
def test_ray_gives_the_results_of_one_process_and_runs_the_trial_of_a_lost_worker_again(
    struck: Path,
    serial: tuple[list[Record], str],
    given: tuple[object, ...],
    tmp_path: Path,
) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    printed = compare(
        *("--loss", "planted_lethal_chunked", *given, "--seeds", 1),
        # One core each, so that two workers run at a time where there are two.
        *("--launcher", "ray", "--trial-cpus", 1, "--output", tmp_path / "c"),
    )
    assert struck.read_text(encoding="utf-8") == "struck"  # the worker was lost
    assert printed.count("done in") == 2
    # The lethal loss is forward KL where it does not strike.
    one = {r.trial.arm.loss: r.measures for r in serial[0] if r.trial.seed == 0}
    one["planted_lethal_chunked"] = one["forward_kl_chunked"]
    found = read(tmp_path / "c")
    assert {record.id for record in found} & {record.id for record in serial[0]}
    for record in found:
        assert record.status == "done", record.reason
        for measure, value in one[record.trial.arm.loss].items():
            assert record.measures[measure] == pytest.approx(value, abs=1e-5), measure


def test_what_no_node_can_run_is_refused() -> None:
    nodes = [{"CPU": 2.0, "node:10.0.0.1": 1.0}, {"CPU": 1.0, "GPU": 4.0}]
    check_room(nodes, 2.0, 0.0)
    check_room(nodes, 1.0, 0.5)
    with pytest.raises(InputError, match=r"--trial-cpus 2 --trial-gpus 1: no node .*2 and 0, 1 an"):
        check_room(nodes, 2.0, 1.0)


def test_without_ray_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    line = refused("compare-losses", "--launcher", "ray", "--output", tmp_path / "c")
    assert line == "--launcher ray needs Ray, which is not installed: pip install 'kdlosses[ray]'"
    assert not (tmp_path / "c").exists()


def test_an_address_that_nothing_answers_at_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        check_address(f"127.0.0.1:{port}")
        check_address(f"ray://127.0.0.1:{port}")
    with pytest.raises(InputError, match=f"127.0.0.1:{port}: no connection"):
        check_address(f"127.0.0.1:{port}")
    check_address("auto")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--trial-cpus", 2),
        ("--trial-gpus", 1),
        ("--ray-address", "here:1"),
        ("--launcher", "ray", "--jobs", 2),
    ],
)
def test_options_that_nothing_would_read_are_refused(arguments: tuple[object, ...]) -> None:
    from click.testing import CliRunner

    from kdrun.cli import cli

    done = CliRunner().invoke(cli, ["compare-losses", *map(str, arguments)])
    assert done.exit_code == UsageError.exit_code
    assert "requires --launcher" in done.stderr
