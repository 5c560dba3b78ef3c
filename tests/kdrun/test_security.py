"""What comes with models, checkpoints and folders is not run, and reaches no file outside them.

Each trap leaves a mark when it is sprung; the tests that may spring it show that it works.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Completed, kdrun
from words import CHAT, WORDS, save_model, save_rows, save_tokenizer, usual_rows

CODE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({mark!r}).touch()


class TrappedConfig(LlamaConfig):
    model_type = "trapped"


class Trapped(LlamaForCausalLM):
    config_class = TrappedConfig


class TrappedTokenizer(PreTrainedTokenizerFast):
    pass


TrappedConfig.register_for_auto_class()
Trapped.register_for_auto_class("AutoModelForCausalLM")
"""


def save_plain(folder: Path, seed: int = 0) -> Path:
    save_model(folder, len(WORDS) + 1, seed)
    save_tokenizer(folder, ("<end>",), CHAT)
    return folder


def edit(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | settings), encoding="utf-8")


class Place:
    """Models, rows and a mark below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder, folder / "mark"
        self.teacher = save_plain(folder / "teacher", 1)
        self.student = save_plain(folder / "student", 2)
        self.rows = save_rows(folder / "rows.jsonl", usual_rows())

    @property
    def sprung(self) -> bool:
        return self.mark.exists()

    def trap(self, name: str, kind: str) -> Path:
        """A model whose class or whose tokenizer is in a Python file beside it."""
        folder = save_plain(self.folder / name, 3)
        (folder / "trap.py").write_text(CODE.format(mark=str(self.mark)), encoding="utf-8")
        if kind == "model":
            classes = {"AutoConfig": "trap.TrappedConfig", "AutoModelForCausalLM": "trap.Trapped"}
            edit(folder / "config.json", model_type="trapped", auto_map=classes)
        else:
            classes = {"AutoTokenizer": [None, "trap.TrappedTokenizer"]}
            own = folder / "tokenizer_config.json"
            edit(own, tokenizer_class="TrappedTokenizer", auto_map=classes)
        return folder

    def adapter_on(self, base: Path) -> Path:
        """An adapter, as peft saves it, for a base model in a folder."""
        import peft
        from transformers import LlamaForCausalLM

        from kdrun.models.adapters import without_advice

        folder = self.folder / f"adapter-on-{base.name}"
        model = LlamaForCausalLM.from_pretrained(self.student)
        with without_advice():
            lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
            peft.get_peft_model(model, lora).save_pretrained(folder)
        edit(folder / "adapter_config.json", base_model_name_or_path=str(base))
        return folder

    def train(self, *more: object, out: str = "run") -> Completed[str]:
        return kdrun(*self.training(*more, out=out))

    def training(self, *more: object, out: str = "run", **models: Path) -> list[object]:
        pair = {"teacher": self.teacher, "student": self.student} | models
        given: list[object] = []
        for name, model in pair.items():
            given += [f"--{name}", model]
        given += ["--data", self.rows, "--max-length", 32, "--batch-size", 2, "--max-steps", 2]
        return [*given, "--set", "data.cache_dir=none", "--output", self.folder / out, *more]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def refused(done: Completed[str]) -> str:
    """The one line of a command that ended with exit code 2."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("kdrun: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


# --- code that comes with a model ---------------------------------------------------------------


def _compare(place: Place, **models: Path) -> list[object]:
    given = ["compare-losses", "--loss", "forward_kl_chunked", "--seeds", 2]
    return [*given, *place.training("--set", "evaluation.answers=0", **models)]


def _rows(place: Place) -> list[object]:
    return ["--data", place.rows, "--max-length", 32]


def _student_of_run(place: Place, trap: Path) -> list[object]:
    shutil.copytree(trap, place.folder / "old" / "student")
    return ["evaluate", place.folder / "old", *_rows(place)]


def _resume(place: Place, trap: Path) -> list[object]:
    """A run that began with a harmless student whose folder has another content by now."""
    assert place.train().returncode == 0
    shutil.rmtree(place.student)
    shutil.copytree(trap, place.student)
    return ["--resume", "--output", place.folder / "run", "--max-steps", 4]


COMMANDS: dict[str, Callable[[Place, Path], list[object]]] = {
    "teacher": lambda p, trap: p.training(teacher=trap),
    "student": lambda p, trap: p.training(student=trap),
    "both": lambda p, trap: p.training(teacher=trap, student=trap),
    "adapters": lambda p, trap: p.training("--lora-rank", 2, student=trap),
    "procedure": lambda p, trap: p.training("--procedure", "seqkd", teacher=trap),
    "dry run of a teacher": lambda p, trap: p.training("--dry-run", teacher=trap),
    "dry run of a student": lambda p, trap: p.training("--dry-run", student=trap),
    "teacher below an adapter": lambda p, trap: p.training(teacher=p.adapter_on(trap)),
    "student below an adapter": lambda p, trap: p.training(student=p.adapter_on(trap)),
    "resume": _resume,
    "evaluate": lambda p, trap: ["evaluate", trap, *_rows(p)],
    "evaluate two": lambda p, trap: ["evaluate", p.student, trap, *_rows(p)],
    "evaluate with a teacher": lambda p, trap: [
        "evaluate",
        p.student,
        "--teacher",
        trap,
        *_rows(p),
    ],
    "evaluate a run": _student_of_run,
    "generate": lambda p, trap: ["generate", trap, "--prompt", "the cat"],
    "generate below an adapter": lambda p, trap: (
        ["generate", p.adapter_on(trap), "--prompt", "the cat"]
    ),
    "init-student": lambda p, trap: (
        ["init-student", trap, "--keep-layers", 1, "--output", p.folder / "made"]
    ),
    "cache-teacher": lambda p, trap: (
        ["cache-teacher", "--teacher", trap, *_rows(p), "--output", p.folder / "cache"]
    ),
    "cache-teacher for a student": lambda p, trap: [
        *("cache-teacher", "--teacher", p.teacher, "--student", trap),
        *(*_rows(p), "--output", p.folder / "cache"),
    ],
    "compare teachers": lambda p, trap: _compare(p, teacher=trap),
    "compare students": lambda p, trap: _compare(p, student=trap),
    "plan a comparison": lambda p, trap: [*_compare(p, student=trap), "--dry-run"],
}


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
@pytest.mark.parametrize("name", COMMANDS)
def test_code_of_a_model_needs_its_flag(place: Place, name: str, kind: str) -> None:
    trap = place.trap("trap", kind)
    line = refused(kdrun(*COMMANDS[name](place, trap), cwd=place.folder))
    assert not place.sprung
    assert "trust_remote_code" in line
    if name.startswith(("generate", "init-student")):
        assert "--trust-remote-code" in line


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("teacher", ("--set", "model.trust_remote_code=true")),
        ("student", ("--set", "model.trust_remote_code=true")),
        ("dry run of a teacher", ("--set", "model.trust_remote_code=true")),
        ("evaluate", ("--set", "model.trust_remote_code=true")),
        ("cache-teacher", ("--set", "model.trust_remote_code=true")),
        ("plan a comparison", ("--set", "model.trust_remote_code=true")),
        ("generate", ("--trust-remote-code",)),
        ("init-student", ("--trust-remote-code",)),
    ],
)
@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_code_of_a_model_runs_with_its_flag(
    place: Place, name: str, flag: tuple[str, ...], kind: str
) -> None:
    trap = place.trap(f"trusted-{kind}", kind)
    done = kdrun(*COMMANDS[name](place, trap), *flag, cwd=place.folder)
    assert done.returncode == 0, done.stderr
    assert place.sprung


def test_a_generate_function_of_a_model_needs_the_flag(place: Place) -> None:
    """transformers would exchange `generate` of the model for that of its folder."""
    trap = save_plain(place.folder / "trap")
    (trap / "custom_generate").mkdir()
    code = f"open({str(place.mark)!r}, 'w')\n\n\ndef generate(model, **given): ...\n"
    (trap / "custom_generate" / "generate.py").write_text(code, encoding="utf-8")
    done = kdrun("generate", trap, "--prompt", "the cat")
    assert done.returncode == 0, done.stderr
    assert not place.sprung


def test_an_adapter_names_no_module_to_import(place: Place) -> None:
    """peft would import the module that stands in adapter_config.json."""
    (place.folder / "trap.py").write_text(f"open({str(place.mark)!r}, 'w')", encoding="utf-8")
    adapter = place.adapter_on(place.student)
    edit(adapter / "adapter_config.json", megatron_config={"a": 1}, megatron_core="trap")
    path = os.pathsep.join([str(place.folder), os.environ.get("PYTHONPATH", "")])
    line = refused(kdrun("generate", adapter, "--prompt", "the", cwd=place.folder, PYTHONPATH=path))
    assert not place.sprung
    assert "megatron_core" in line


# --- pickles ------------------------------------------------------------------------------------


class Trap:
    """A pickle that leaves a mark when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def set_trap(file: Path, mark: Path, zipped: bool = True) -> None:
    torch.save({"state": Trap(mark)}, file, _use_new_zipfile_serialization=zipped)


def test_the_trap_works(tmp_path: Path) -> None:
    set_trap(tmp_path / "trap.pt", tmp_path / "mark")
    torch.load(tmp_path / "trap.pt", weights_only=False)
    assert (tmp_path / "mark").exists()
    (tmp_path / "mark").unlink()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "trap.pt", weights_only=True)
    assert not (tmp_path / "mark").exists()


def list_again(checkpoint: Path) -> None:
    """As someone does who changes files of a checkpoint and knows of its list."""
    files = {
        path.name: {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in checkpoint.iterdir()
        if path.name != "complete"
    }
    (checkpoint / "complete").write_text(json.dumps({"files": files}), encoding="utf-8")


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run of two steps."""
    place = Place(tmp_path_factory.mktemp("half"))
    done = place.train("--set", "training.save_steps=2")
    assert done.returncode == 0, done.stderr
    return place


def copy_of(half: Place, folder: Path) -> tuple[Path, Path]:
    """A copy of the run, and its checkpoint."""
    shutil.copytree(half.folder / "run", folder / "run")
    return folder / "run", folder / "run" / "checkpoints" / "checkpoint-2"


STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", STATES)
def test_a_changed_checkpoint_is_refused_unread(
    half: Place, tmp_path: Path, name: str, zipped: bool
) -> None:
    run, checkpoint = copy_of(half, tmp_path)
    set_trap(checkpoint / name, tmp_path / "mark", zipped)
    line = refused(kdrun("--resume", "--output", run, "--max-steps", 4))
    assert name in line
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("name", [*STATES, "scaler.pt", "optimizer.bin", "pytorch_model.bin"])
def test_a_pickle_is_not_run_though_its_list_was_changed_too(
    half: Place, tmp_path: Path, name: str, listed: bool
) -> None:
    run, checkpoint = copy_of(half, tmp_path)
    set_trap(checkpoint / name, tmp_path / "mark")
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    if listed:
        list_again(checkpoint)
    else:  # as versions did that listed no files
        (checkpoint / "complete").write_text("{}", encoding="utf-8")
    done = kdrun("--resume", "--output", run, "--max-steps", 4)
    assert not (tmp_path / "mark").exists()
    if name in STATES[:3] or name == "pytorch_model.bin":
        assert "contains Python objects" in refused(done)
    else:
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_are_not_run(place: Place, zipped: bool) -> None:
    (place.student / "model.safetensors").unlink()
    set_trap(place.student / "pytorch_model.bin", place.mark, zipped)
    for command in (
        place.training(),
        ["evaluate", place.student, *_rows(place)],
        ["generate", place.student, "--prompt", "the"],
    ):
        assert "pytorch_model.bin contains Python objects" in refused(kdrun(*command))
        assert not place.sprung


def test_pickled_adapters_are_not_run(place: Place) -> None:
    adapter = place.adapter_on(place.student)
    (adapter / "adapter_model.safetensors").unlink()
    set_trap(adapter / "adapter_model.bin", place.mark)
    line = refused(kdrun("generate", adapter, "--prompt", "the"))
    assert "adapter_model.bin contains Python objects" in line
    assert not place.sprung


@pytest.mark.parametrize("zipped", [True, False])
def test_broken_pickled_weights_are_told_in_one_line(place: Place, zipped: bool) -> None:
    from safetensors.torch import load_file

    (place.student / "model.safetensors").rename(place.folder / "weights")
    weights = place.student / "pytorch_model.bin"
    found = load_file(place.folder / "weights")
    torch.save(found, weights, _use_new_zipfile_serialization=zipped)
    assert kdrun("generate", place.student, "--prompt", "the").returncode == 0
    for size in (weights.stat().st_size // 2, 0):
        weights.write_bytes(weights.read_bytes()[:size])
        refused(kdrun("generate", place.student, "--prompt", "the"))


# --- names and links ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/b", "..", "a\nb", "a;b", ""])
def test_names_of_new_losses_are_plain(tmp_path: Path, name: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    refused(kdrun("losses", "new", name, cwd=inner))
    assert list(inner.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["inner"]


@pytest.mark.parametrize("name", ["../../victim", "{absolute}", "a/../../../victim"])
def test_the_list_of_a_checkpoint_names_its_own_files(
    half: Place, tmp_path: Path, name: str
) -> None:
    run, checkpoint = copy_of(half, tmp_path)
    victim = run / "victim"
    victim.write_bytes(b"outside")
    name = name.format(absolute=victim)
    known = {"bytes": 7, "sha256": hashlib.sha256(b"outside").hexdigest()}
    listed = json.loads((checkpoint / "complete").read_text("utf-8"))
    listed["files"][name] = known
    (checkpoint / "complete").write_text(json.dumps(listed), encoding="utf-8")
    assert f"{name} is outside the folder" in refused(
        kdrun("--resume", "--output", run, "--max-steps", 4)
    )


@pytest.mark.parametrize("name", ["../rows-00001.safetensors", "/etc/passwd", "a/b", ".."])
def test_the_manifest_of_a_cache_names_its_own_files(place: Place, name: str) -> None:
    cache = place.folder / "cache"
    given = ["--teacher", place.teacher, "--data", place.rows, "--max-length", 32]
    assert kdrun("cache-teacher", *given, "--output", cache).returncode == 0
    manifest = json.loads((cache / "manifest.json").read_text("utf-8"))
    shutil.copy(cache / manifest["shards"][0]["name"], place.folder)
    manifest["shards"][0]["name"] = name
    (cache / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert "manifest.json" in refused(place.train("--teacher-cache", cache))


def test_columns_are_not_paths(place: Place) -> None:
    rows = [row | {"../../evil": "a", "/tmp/evil-column": "b"} for row in usual_rows()]
    save_rows(place.rows, rows)
    cached = ("--set", f"data.cache_dir={place.folder / 'tokens' / 'here'}")
    before = {path.name for path in place.folder.iterdir()} | {"tokens", "run"}
    assert place.train(*cached).returncode == 0
    assert {path.name for path in place.folder.iterdir()} == before
    assert not Path("/tmp/evil-column").exists()


def test_records_of_a_comparison_are_not_paths(place: Place) -> None:
    given = _compare(place)
    assert kdrun(*given).returncode == 0
    folder = place.folder / "run"
    record = sorted((folder / "records").glob("*.json"))[0]
    value = json.loads(record.read_text("utf-8")) | {"id": "../../victim"}
    record.write_text(json.dumps(value), encoding="utf-8")
    for command in (["report", folder], given):
        assert str(record) in refused(kdrun(*command))
    assert not (place.folder / "victim.json").exists()


LINKED = ("student", "checkpoints", "tensorboard", "adapter", "base", ".student.partial")


@pytest.mark.parametrize("name", LINKED)
def test_overwriting_follows_no_link(place: Place, name: str) -> None:
    """Neither what a link points to is removed, nor does it stay and become part of the new run."""
    run, kept = place.folder / "run", place.folder / "kept"
    assert place.train().returncode == 0
    (kept / "checkpoint-1").mkdir(parents=True)
    (kept / "config.json").write_text("{}", encoding="utf-8")
    (kept / "checkpoint-1" / "complete").write_text("{}", encoding="utf-8")
    shutil.rmtree(run / name, ignore_errors=True)
    (run / name).symlink_to(kept)
    done = place.train("--overwrite")
    assert done.returncode == 0, done.stderr
    assert not (run / name).is_symlink()
    assert {path.relative_to(kept).as_posix() for path in kept.rglob("*")} == {
        "config.json",
        "checkpoint-1",
        "checkpoint-1/complete",
    }
    assert (kept / "config.json").read_text("utf-8") == "{}"


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "summary.json", "config.yaml", "inputs.safetensors"]
)
def test_overwriting_writes_through_no_link(place: Place, name: str) -> None:
    run, kept = place.folder / "run", place.folder / "kept"
    assert place.train().returncode == 0
    (run / name).replace(kept)
    content = kept.read_bytes()
    (run / name).symlink_to(kept)
    assert place.train("--overwrite").returncode == 0
    assert kept.read_bytes() == content


@pytest.mark.parametrize("name", ["student", ".student.partial", "checkpoints/rehearsal"])
def test_resuming_removes_nothing_behind_links(half: Place, tmp_path: Path, name: str) -> None:
    run, _ = copy_of(half, tmp_path)
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "config.json").write_text("{}", encoding="utf-8")
    shutil.rmtree(run / name, ignore_errors=True)
    (run / name).symlink_to(kept)
    done = kdrun("--resume", "--output", run, "--max-steps", 4)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in kept.iterdir()] == ["config.json"]
    assert (kept / "config.json").read_text("utf-8") == "{}"
    assert (run / "student" / "model.safetensors").is_file()
