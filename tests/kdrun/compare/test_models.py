"""What a comparison knows of its models: which they were, and what they measure untrained."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from small import QUICK, kdrun, options, refused

from kdrun.compare.command import comparison_of
from kdrun.compare.declare import declare
from kdrun.compare.ledger import Ledger
from kdrun.compare.references import TEACHER, UNTRAINED, measure_references, read_references
from kdrun.compare.run import Comparison

for package in ("scipy", "matplotlib", "jinja2"):
    pytest.importorskip(package)


@pytest.fixture
def pair(tiny_pair: Any, tmp_path: Path) -> dict[str, Path]:
    """Teacher and student that a test may change."""
    return {
        name: Path(shutil.copytree(getattr(tiny_pair, name), tmp_path / name))
        for name in ("teacher", "student")
    }


def compared(rows: Path, pair: dict[str, Path], **changes: Any) -> Comparison:
    given = options(rows, teachers=(str(pair["teacher"]),), students=(str(pair["student"]),))
    return comparison_of(replace(given, **changes))


def train(folder: Path) -> None:
    """Change the weights in place, as training into the same folder does."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.get_output_embeddings().weight.data += 0.1
    model.save_pretrained(folder)


def rewrite_template(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("name", ["teacher", "student"])
@pytest.mark.parametrize("change", [train, rewrite_template])
def test_a_model_that_was_changed_in_place_is_refused(
    tiny_pair: Any, pair: dict[str, Path], tmp_path: Path, name: str, change: Any
) -> None:
    folder = tmp_path / "c"
    declare(compared(tiny_pair.rows, pair), Ledger(folder))
    whole = (folder / "comparison.yaml").read_text(encoding="utf-8")
    # Written anew with the same content it is the same model.
    kept = Path(shutil.copytree(pair[name], tmp_path / "kept"))
    shutil.rmtree(pair[name])
    shutil.copytree(kept, pair[name])
    declare(compared(tiny_pair.rows, pair), Ledger(folder))
    assert (folder / "comparison.yaml").read_text(encoding="utf-8") == whole
    change(pair[name])
    line = refused(
        *("compare-losses", *QUICK, "--data", tiny_pair.rows, "--loss", "forward_kl_chunked"),
        *("--teacher", pair["teacher"], "--student", pair["student"]),
        *("--seeds", 2, "--output", folder),
    )
    assert line == (
        f"--output {folder}: the model {pair[name]} was changed after the first trial; restore "
        "it, or choose another folder"
    )
    assert (folder / "comparison.yaml").read_text(encoding="utf-8") == whole
    kdrun("report", folder)  # needs no models


def test_every_model_of_every_command_is_known(
    tiny_pair: Any, pair: dict[str, Path], tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / "c")
    declare(compared(tiny_pair.rows, pair), ledger)
    declare(compared(tiny_pair.rows, {**pair, "student": pair["teacher"]}), ledger)
    declare(comparison_of(options(tiny_pair.rows)), Ledger(tmp_path / "built-in"))
    found = [
        yaml.safe_load((tmp_path / name / "comparison.yaml").read_text(encoding="utf-8"))["models"]
        for name in ("c", "built-in")
    ]
    assert found[0].keys() == {str(pair["teacher"]), str(pair["student"])}
    assert len(set(found[0].values())) == 2
    # The built-in student has no weights before it is trained; the entry is the teacher's.
    assert list(found[1]) == ["builtin"]


def test_references_belong_to_the_rows_that_they_were_measured_on(
    tiny_pair: Any, pair: dict[str, Path], tmp_path: Path
) -> None:
    ledger, names = Ledger(tmp_path / "c"), (str(pair["teacher"]), str(pair["student"]))
    console = Console(file=io.StringIO())
    quiet = (*options(tiny_pair.rows).overrides, ("evaluation.answers", 0))
    plain = compared(tiny_pair.rows, pair, overrides=quiet)
    tuned = compared(tiny_pair.rows, pair, overrides=quiet, lrs=(1e-3, 1e-2))
    measure_references(plain, ledger, console)
    assert read_references(ledger, names, "test") == {}
    measure_references(tuned, ledger, console)
    of_all, of_test = (read_references(ledger, names, part) for part in ("all", "test"))
    assert of_all.keys() == of_test.keys() == {UNTRAINED, TEACHER}
    assert of_all[TEACHER]["ce"] != of_test[TEACHER]["ce"]
    # What is known is not measured again.
    before = (ledger.folder / "references.json").read_text(encoding="utf-8")
    measure_references(plain, ledger, console)
    assert (ledger.folder / "references.json").read_text(encoding="utf-8") == before


def test_rows_to_report_on_are_measured_without_a_tuning(
    tiny_pair: Any, pair: dict[str, Path], tmp_path: Path
) -> None:
    test = tmp_path / "test.jsonl"
    lines = tiny_pair.rows.read_text(encoding="utf-8").splitlines(keepends=True)
    test.write_text("".join(lines[:5]), encoding="utf-8")
    quiet = (*options(tiny_pair.rows).overrides, ("evaluation.answers", 0))
    ledger, names = Ledger(tmp_path / "c"), (str(pair["teacher"]), str(pair["student"]))
    given = {
        "all": compared(tiny_pair.rows, pair, overrides=(*quiet, ("data.eval", str(test)))),
        "test": compared(tiny_pair.rows, pair, overrides=(*quiet, ("data.test", str(test)))),
    }
    found = {}
    for part, comparison in given.items():
        assert comparison.plan.reported == part
        measure_references(comparison, ledger, Console(file=io.StringIO()))
        found[part] = read_references(ledger, names, comparison.plan.reported)
    assert found["test"] == found["all"]  # the same rows, under another key
    plan = declare(given["test"], Ledger(tmp_path / "declared"))
    assert plan == given["test"].plan  # also of the folder alone
