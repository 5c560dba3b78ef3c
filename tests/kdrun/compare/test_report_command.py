"""``kdrun report``: from a folder alone, finished or not, or one line on what is wrong with it."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import yaml
from small import kdrun, options, records, refused, rows_file

from kdrun.compare.command import comparison_of
from kdrun.compare.declare import declare
from kdrun.compare.ledger import Ledger
from kdrun.compare.plan import Plan
from kdrun.compare.record import Record, Trial
from kdrun.config.load import load_config
from kdrun.errors import InputError

for package in ("scipy", "matplotlib", "jinja2"):
    pytest.importorskip(package)


def value_of(trial: Trial) -> float:
    """A measure that follows from the trial: losses help, seeds vary a little."""
    gain = 0.0 if trial.arm.loss is None else 1.0 + 0.001 * (trial.seed % 3)
    return 4.0 - gain - 0.1 * trial.arm.lr + 0.01 * (trial.seed % 7)


def add(ledger: Ledger, plan: Plan, trials: list[Trial]) -> None:
    for trial in trials:
        identity = plan.identity(trial)
        measures: dict[str, float | None] = {"ce": value_of(trial)}
        ledger.add(Record(id=identity, trial=trial, status="done", measures=measures))


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv", encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished comparison of one loss over three seeds; no trial of it was run."""
    comparison = comparison_of(options(rows_file(tmp_path), seeds=3))
    ledger = Ledger(tmp_path / "c")
    add(ledger, declare(comparison, ledger), comparison.plan.open([]))
    return tmp_path / "c"


def test_a_finished_comparison(folder: Path) -> None:
    printed = kdrun("report", folder).stderr
    assert "forward_kl_chunked is better than cross-entropy alone" in printed
    assert "Unfinished" not in printed
    assert f"report: {folder / 'report.html'}" in printed
    names = {path.name for path in folder.iterdir()}
    assert {"report.html", "results.csv", "results.tex", "figures"} <= names
    assert [row["status"] for row in rows(folder)] == ["done"] * 6


def test_an_unfinished_one_says_what_is_missing(folder: Path) -> None:
    for record in sorted(records(folder).values(), key=lambda r: r["trial"]["seed"])[3:]:
        (folder / "records" / f"{record['id']}.json").unlink()
    printed = kdrun("report", folder).stderr
    assert "Unfinished: 3 of 6 trials have not run" in printed
    assert sorted(row["status"] for row in rows(folder)) == ["done"] * 3 + ["missing"] * 3
    for path in (folder / "records").iterdir():
        path.unlink()
    printed = kdrun("report", folder).stderr
    assert "Unfinished: 6 of 6 trials have not run" in printed
    assert "No verdict on cross-entropy of held-out rows is possible yet" in printed


def test_losses_and_seeds_that_came_later_are_part_of_it(folder: Path) -> None:
    ledger = Ledger(folder)
    more = options(folder.parent / "rows.jsonl", losses=("hellinger_chunked",), seeds=4)
    comparison = comparison_of(more)
    plan = declare(comparison, ledger)
    assert plan.axes.losses == ("forward_kl_chunked", "hellinger_chunked")
    assert declare(comparison, ledger) == plan
    own = ledger.records()
    add(ledger, plan, comparison.plan.open(comparison.plan.own(own)))
    printed = kdrun("report", folder).stderr
    assert "Unfinished: 1 of 12 trials have not run" in printed  # forward KL's fourth seed
    assert [row["loss"] for row in rows(folder) if row["status"] == "missing"] == [
        "forward_kl_chunked"
    ]


def test_a_folder_older_than_a_key_of_the_configuration_goes_on(folder: Path) -> None:
    file = folder / "comparison.yaml"
    declared = yaml.safe_load(file.read_text(encoding="utf-8"))
    del declared["shared"]["procedure"], declared["shared"]["training"]["nan_loss"]
    del declared["axes"]["procedures"], declared["axes"]["alone"], declared["models"]
    file.write_text(yaml.safe_dump(declared), encoding="utf-8")
    older = [{**record, "trial": dict(record["trial"])} for record in records(folder).values()]
    for record in older:
        record["trial"]["arm"] = dict(record["trial"]["arm"])
        record["trial"]["arm"].pop("procedure")
        path = folder / "records" / f"{record['id']}.json"
        path.write_text(json.dumps(record), encoding="utf-8")
    ledger = Ledger(folder)
    comparison = comparison_of(options(folder.parent / "rows.jsonl", seeds=3))
    assert declare(comparison, ledger).open(ledger.records()) == []
    assert "Unfinished" not in kdrun("report", folder).stderr
    declared["shared"]["training"]["nan_loss"] = "skip"
    file.write_text(yaml.safe_dump(declared), encoding="utf-8")
    with pytest.raises(InputError, match=r"training\.nan_loss='skip', now 'stop'"):
        declare(comparison, ledger)


def test_a_tuning_that_is_not_finished_and_then_is(folder: Path) -> None:
    comparison = comparison_of(options(folder.parent / "rows.jsonl", lrs=(1.0, 2.0), seeds=2))
    ledger = Ledger(folder)
    plan = declare(comparison, ledger)
    tuning = plan.open([])
    add(ledger, plan, tuning[:3])
    printed = kdrun("report", folder).stderr
    assert "No verdict is possible yet: the tuning trials are not finished." in printed
    assert "Unfinished: 5 of 8 trials have not run" in printed
    assert "The folder contains 6 more trials from earlier commands" in printed
    add(ledger, plan, tuning[3:])
    finals = plan.open(plan.own(ledger.records()))
    assert {(trial.stage, trial.arm.lr) for trial in finals} == {("final", 2.0)}
    add(ledger, plan, finals)
    assert "is better than cross-entropy alone" in kdrun("report", folder).stderr


def test_the_settings_come_back_as_they_were(tmp_path: Path) -> None:
    comparison = comparison_of(options(rows_file(tmp_path)))
    plan = declare(comparison, Ledger(tmp_path / "c"))
    assert plan == comparison.plan  # its hash too, through YAML and back
    text = (tmp_path / "c" / "comparison.yaml").read_text(encoding="utf-8")
    shared = yaml.safe_load(text)["shared"]
    assert shared["data"]["shift_windows"] is False
    assert shared["optimizer"]["betas"] == list(load_config().optimizer.betas)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not the record of a trial"),
        ('{"id": "', "not the record of a trial"),
        ("as it was, seed 7", "was edited"),
    ],
)
def test_an_edited_or_half_written_record_is_named(folder: Path, text: str, message: str) -> None:
    name, record = next(iter(records(folder).items()))
    path = folder / "records" / f"{name}.json"
    if text.endswith("seed 7"):
        text = path.read_text(encoding="utf-8")
        text = text.replace(f'"seed": {record["trial"]["seed"]}', '"seed": 7')
    path.write_text(text, encoding="utf-8")
    line = refused("report", folder)
    assert f"{name}.json" in line
    assert message in line


def test_an_edited_measure_is_refused_by_its_checksum(folder: Path) -> None:
    name, record = next(iter(records(folder).items()))
    path = folder / "records" / f"{name}.json"
    record["measures"]["ce"] -= 1.0
    path.write_text(json.dumps(record), encoding="utf-8")
    assert f"{name}.json: was edited, because its checksum" in refused("report", folder)
    del record["checksum"]  # as in folders of earlier versions
    path.write_text(json.dumps(record), encoding="utf-8")
    kdrun("report", folder)


@pytest.mark.parametrize(
    "text",
    [
        '[{"role": ',
        '{"a": 1}',
        '[{"role": "teacher"}]',
        "[3]",
        '[{"teacher": "t", "student": "s", "role": "teacher", "measures": {"ce": "low"}}]',
        '[{"teacher": "t", "student": "s", "role": "teacher", "measures": 3}]',
    ],
)
def test_edited_references_are_named(folder: Path, text: str) -> None:
    (folder / "references.json").write_text(text, encoding="utf-8")
    assert "references.json: was edited or damaged" in refused("report", folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("axes", {"losses": []}, "not the settings of a comparison"),
        ("yardstick", "bleu", "no such measure"),
        ("extra", 1, "extra"),
        ("shared", {"training": {"max_steps": 99}}, "no record belongs to a trial with its shared"),
    ],
)
def test_edited_settings_are_named(folder: Path, key: str, value: object, message: str) -> None:
    path = folder / "comparison.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump({**settings, key: value}), encoding="utf-8")
    line = refused("report", folder)
    assert "comparison.yaml" in line
    assert message in line


def test_a_folder_without_a_comparison(tmp_path: Path) -> None:
    assert "no such folder" in refused("report", tmp_path / "none")
    assert "has no comparison.yaml" in refused("report", tmp_path)
    (tmp_path / "config.yaml").write_text("loss: {}", encoding="utf-8")
    assert "is the folder of a run" in refused("report", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_start_that_was_killed_before_its_declaration_is_no_foreign_folder(
    folder: Path, tmp_path: Path
) -> None:
    for name in ("records", "trials", "locks"):
        (tmp_path / "new" / name).mkdir(parents=True)
    (tmp_path / "new" / ".comparison.yaml.partial").write_text("axes:", encoding="utf-8")
    Ledger(tmp_path / "new")
    # Where trials have run, settings that are lost are not made up.
    (folder / "comparison.yaml").unlink()
    copied = shutil.copytree(folder, tmp_path / "copied")
    line = refused("compare-losses", "--seeds", 2, "--output", copied)
    assert "is not empty and contains no comparison" in line
