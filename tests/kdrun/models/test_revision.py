"""Models of the hub at a revision: in its cache here, since no test uses a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kdrun.config.sections import ModelConfig
from kdrun.errors import InputError
from kdrun.models.locate import ModelSource, at_revision, locate_model
from kdrun.models.pairs import locate_pair

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@dataclass(frozen=True)
class Hub:
    """A cache of the hub with two revisions of a teacher and of a student."""

    cache: Path
    rows: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "kdrun", *arguments],
            env={**os.environ, "HF_HUB_CACHE": str(self.cache), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            encoding="utf-8",
        )


@pytest.fixture
def hub(tiny_pair: Any, tiny_tokenizer: Any, tmp_path: Path) -> Hub:
    from pair_configs import tiny_llama

    cache = tmp_path / "hub"
    for name, own, width, seed in (("teacher", "large", 32, 7), ("student", "small", 16, 8)):
        repository = cache / f"models--me--{own}"
        for revision, commit in COMMITS.items():
            (repository / "refs").mkdir(parents=True, exist_ok=True)
            (repository / "refs" / revision).write_text(commit, encoding="utf-8")
            snapshot = repository / "snapshots" / commit
            if revision == "main":
                shutil.copytree(getattr(tiny_pair, name), snapshot)
            else:
                tiny_llama(len(tiny_tokenizer), width, seed).save_pretrained(snapshot)
                tiny_tokenizer.save_pretrained(snapshot)
    return Hub(cache, tiny_pair.rows)


def run(hub: Hub, folder: Path, *settings: str) -> dict[str, Any]:
    arguments = ["--teacher", "me/large", "--student", "me/small", "--data", str(hub.rows)]
    arguments += ["--max-length", "64", "--max-steps", "1", "--output", str(folder)]
    for setting in ("loss.compiled=false", *settings):
        arguments += ["--set", setting]
    done = hub.run(*arguments)
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


@pytest.mark.slow
def test_a_run_takes_the_weights_of_the_revision_and_records_it(hub: Hub, tmp_path: Path) -> None:
    from kdrun.run.record import Record

    def before(name: str, *settings: str) -> tuple[float, float]:
        found = run(hub, tmp_path / name, *settings)["before"]
        return found["eval_ce"], found["eval_forward_kl"]

    plain = before("plain")
    of_student = before("student", "model.revision=v2")
    of_teacher = before("teacher", f"model.teacher_revision={COMMITS['v2']}")
    assert of_student[0] != plain[0]
    assert of_teacher[0] == plain[0]
    assert of_teacher[1] != plain[1]
    commits = {}
    for name in ("plain", "student", "teacher"):
        record = Record.read(tmp_path / name)
        assert record is not None
        commits[name] = (record.sources.teacher_commit, record.sources.student_commit)
    main, second = COMMITS["main"], COMMITS["v2"]
    assert commits == {
        "plain": (main, main),
        "student": (main, second),
        "teacher": (second, main),
    }
    # A run that goes on at another revision would have another teacher.
    folder = str(tmp_path / "plain")
    again = hub.run(
        "--resume", "--output", folder, "--max-steps", "2", "--set", "model.teacher_revision=v2"
    )
    assert again.returncode == 2
    assert "the teacher's weights have changed" in again.stderr


@pytest.mark.slow
def test_adapters_remember_the_revision_of_their_base_model(hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = tmp_path / "run"
    after = run(hub, folder, "model.revision=v2", "lora.rank=2", "optimizer.lr=1e-2")["after"]
    settings = json.loads((folder / "student" / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] == "me/small"
    assert settings["revision"] == "v2"
    done = hub.run(
        "evaluate", str(folder), "--data", str(hub.rows), "--max-length", "64",
        "--output", str(tmp_path / "found.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert locate_model(folder / "student").revision == "v2"
    assert after["eval_ce"] > 0


@pytest.mark.slow
def test_a_cache_names_the_revision(hub: Hub, tmp_path: Path) -> None:
    done = hub.run(
        "cache-teacher", "--teacher", "me/large", "--student", "me/small", "--data",
        str(hub.rows), "--max-length", "64", "--set", "model.teacher_revision=v2",
        "--output", str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["teacher_name"] == "me/large@v2"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"revision": "v2"}, r"^model\.revision=v2 has no effect: .*student is a local folder"),
        ({"teacher_revision": "v2"}, r"^model\.teacher_revision=v2 has no effect: .*teacher is a"),
        ({"teacher_revision": "v2", "teacher": None}, "without model.teacher"),
        ({"revision": "v2", "student": "builtin"}, "is a local folder"),
    ],
)
def test_a_revision_of_a_folder_is_refused(
    tiny_pair: Any, given: dict[str, Any], said: str
) -> None:
    named = {"teacher": str(tiny_pair.teacher), "student": str(tiny_pair.student), **given}
    with pytest.raises(InputError, match=said):
        locate_pair(ModelConfig(**named))


@pytest.mark.slow
def test_an_unknown_revision_is_one_line(hub: Hub, tmp_path: Path) -> None:
    done = hub.run(
        "--teacher", "me/large", "--student", "me/small", "--data", str(hub.rows),
        "--set", "model.revision=v3", "--output", str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "me/small@v3" in done.stderr
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_source_names_its_revision() -> None:
    source = at_revision(ModelSource("me/model"), "v2", "model.revision")
    assert str(source) == "me/model@v2"
    assert source.name == "me/model"
    assert source.options == {"revision": "v2"}
    assert at_revision(ModelSource("me/model"), None, "model.revision").options == {}
