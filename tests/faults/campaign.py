"""Faults on purpose: a command is struck at one file operation after another, and then repeated.

    python tests/faults/campaign.py SCENARIO MODE [--every K] [--first N] [--report FILE]

A scenario is a small command (train, resume, merge, cache, cache-resume, cache-top-k, compare,
evaluate), a mode what happens at the n-th operation below its folder: ``kill`` ends the process,
``full`` is a disk that is full from then on, ``read-only`` a folder that is, ``vanish`` a file that
is gone when it is opened, ``no-locks`` a file system without locks. ``moments`` kills at random
times instead. After each, the command is given again: it must end as it does undisturbed, byte for
byte.

A C compiler is needed for ``shim.c``; commands are forked from this process, which has imported
what takes long.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODES = {"kill": 1, "full": 2, "read-only": 3, "vanish": 4, "no-locks": 5}
_LONGEST = 300
"""Seconds after which a command counts as hanging; undisturbed, the longest takes about 20."""
_HANGS = "Timeout ("  # faulthandler's first word


@dataclass
class Scenario:
    """A command, and what it leaves.

    Attributes:
        arguments: of kdrun; ``{out}`` stands for its folder.
        again: how it is repeated after a fault.
        kept: of the folder what must be as undisturbed; a function to comparable content.
        before: prepares the folder.
    """

    arguments: list[str]
    again: list[str]
    kept: Callable[[Path], Any]
    before: Callable[[Path], None] = lambda out: None


@dataclass
class Figures:
    """What a campaign found."""

    scenario: str
    mode: str
    faults: int = 0
    recovered: int = 0
    told: int = 0
    wrong: list[str] = field(default_factory=list)


def build_shim(folder: Path) -> Path | None:
    """Compile the shim; None without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    library = folder / "shim.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O2", "-o", library, HERE / "shim.c", "-ldl"], check=True
    )
    return library


def bytes_of(name: str) -> Callable[[Path], Any]:
    """The content of all files below a folder of the output."""
    return lambda out: {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted((out / name).rglob("*"))
        if path.is_file() and path.name != ".lock"  # of a dead process; the next one takes it over
    }


def records_of(out: Path) -> Any:
    """What a comparison measured, without times."""
    records = [json.loads(path.read_text("utf-8")) for path in (out / "records").glob("*.json")]
    return sorted((record["id"], json.dumps(record["measures"])) for record in records)


def scenarios(inputs: Path) -> dict[str, Scenario]:
    """All of them, on small models below a folder."""
    pair = ["--teacher", f"{inputs}/teacher", "--student", f"{inputs}/student"]
    rows = ["--data", f"{inputs}/rows.jsonl", "--max-length", "32", "--batch-size", "2"]
    quiet = ["--set", "data.cache_dir=none"]
    steps = ["--max-steps", "4", "--set", "training.save_steps=2"]
    train = [*pair, *rows, *quiet, *steps, "--output", "{out}"]
    resume = ["--resume", "--output", "{out}", "--max-steps", "4"]

    def half(out: Path) -> None:
        shutil.copytree(inputs / "half", out, dirs_exist_ok=True)

    def broken_off(out: Path) -> None:
        shutil.copytree(inputs / "cache", out, dirs_exist_ok=True)
        (out / "rows-00005.safetensors").write_bytes(b"damaged")
        for name in ("manifest.json", "rows-00003.safetensors", "rows-00006.safetensors"):
            (out / name).unlink()

    adapters = ["--lora-rank", "2", "--set", "lora.merge=true"]
    compare = ["compare-losses", *pair, *rows, *quiet, "--max-steps", "2", "--seeds", "2"]
    compare += [
        "--loss",
        "forward_kl_chunked",
        "--set",
        "evaluation.answers=0",
        "--output",
        "{out}",
    ]
    cache = ["cache-teacher", *pair, *rows, *quiet, "--output", "{out}"]
    top_k = ["--kind", "top-k", "--k", "5"]
    measured = ["evaluate", f"{inputs}/student", "--data", f"{inputs}/rows.jsonl", *quiet]
    measured += ["--max-length", "32", "--output", "{out}/measures.json"]
    return {
        "train": Scenario(train, resume, bytes_of("student")),
        "resume": Scenario(resume, resume, bytes_of("student"), half),
        "merge": Scenario([*train, *adapters], resume, bytes_of("student")),
        "cache": Scenario(cache, cache, bytes_of(".")),
        "cache-resume": Scenario(cache, cache, bytes_of("."), broken_off),
        "cache-top-k": Scenario([*cache, *top_k], [*cache, *top_k], bytes_of(".")),
        "compare": Scenario(compare, compare, records_of),
        "compare-2": Scenario([*compare, "--jobs", "2"], [*compare, "--jobs", "2"], records_of),
        "evaluate": Scenario(measured, measured, bytes_of("."), lambda out: out.mkdir()),
    }


def write_every_batch() -> None:
    """Make each batch of a cache a shard, so that a small cache has as many as a large one."""
    from kdrun.cache.write import ShardWriter, StoredRow

    ordinary = ShardWriter.add

    def add(self: ShardWriter, first: int, rows: Sequence[StoredRow]) -> None:
        ordinary(self, first, rows)
        self.flush()

    ShardWriter.add = add  # type: ignore[method-assign]


class Struck:
    """Runs commands in children of this process, armed or not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shim: Any = None

    def arm_with(self, library: str) -> None:
        """Take the shim that this process was started with."""
        self._shim = ctypes.CDLL(library)
        self._shim.fault_count.restype = ctypes.c_long

    def run(
        self, arguments: Sequence[str], out: Path, mode: int = -1, n: int = 0
    ) -> tuple[int, str, int]:
        """Exit code, standard error, and file operations counted."""
        said, count = self.folder / "stderr", self.folder / "count"
        count.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            self._child([part.replace("{out}", str(out)) for part in arguments], out, mode, n)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        counted = int(count.read_text()) if count.is_file() else 0
        return code, said.read_text(encoding="utf-8", errors="replace"), counted

    def _child(self, arguments: list[str], out: Path, mode: int, n: int) -> None:
        errors = os.open(self.folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(errors, 2)
        faulthandler.dump_traceback_later(_LONGEST, file=2)  # where it hangs
        signal.alarm(_LONGEST + 5)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = ["kdrun", *arguments]
        if mode >= 0:
            self._shim.fault_arm(mode, ctypes.c_long(n), str(out).encode())
        code = 1
        try:
            from kdrun.cli import main

            main()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            if self._shim is not None:
                operations = self._shim.fault_count()
                self._shim.fault_arm(-1, ctypes.c_long(0), b"")
                (self.folder / "count").write_text(str(operations))
            sys.stderr.flush()
            os._exit(code)


def recover(struck: Struck, scenario: Scenario, out: Path) -> tuple[int, str]:
    """Give the command again, as its messages say: resumed, or anew where nothing had begun."""
    code, said, _ = struck.run(scenario.again, out)
    if code == 2 and ("no run to continue" in said or "--resume: " in said):
        code, said, _ = struck.run([*scenario.arguments, "--overwrite"], out)
        if code == 2 and "not empty" in said:
            shutil.rmtree(out)
            code, said, _ = struck.run(scenario.arguments, out)
    return code, said


def judge(
    struck: Struck, scenario: Scenario, out: Path, expected: Any, mode: str, code: int, said: str
) -> str | None:
    """What is wrong after a fault, or None."""
    if "Traceback" in said:
        return f"traceback: {said.splitlines()[-1]}"
    if _HANGS in said:
        return f"hangs: {said[said.index(_HANGS) :]}"
    if code not in (0, 1, 2, -signal.SIGKILL):
        return f"exit code {code}"
    if code in (1, 2) and not any(line.startswith("kdrun: ") for line in said.splitlines()):
        return f"exit code {code} without a line"
    if os.environ.get("KDRUN_FAULTS_KEEP"):
        shutil.copytree(out, os.environ["KDRUN_FAULTS_KEEP"], dirs_exist_ok=True)
    if code != 0:
        code, said = recover(struck, scenario, out)
        if mode == "vanish" and code == 2 and "Traceback" not in said:
            return None  # what is gone cannot be had again, and that is said
        if code == 2 and "already contains" in said and scenario.kept(out) == expected:
            return None  # it had been complete
        if code != 0 or "Traceback" in said:
            if _HANGS in said:
                return f"repeated: hangs: {said[said.index(_HANGS) :]}"
            last = said.strip().splitlines()[-1:] or [""]
            return f"repeated: exit code {code}: {last[0]}"
    found = scenario.kept(out)
    if found == expected:
        return None
    if not isinstance(found, dict):
        return "repeated: another result"
    different = [n for n in sorted({*found, *expected}) if found.get(n) != expected.get(n)]
    return f"repeated: another {', '.join(different)}"


def campaign(
    struck: Struck, name: str, scenario: Scenario, mode: str, first: int, every: int
) -> Figures:
    """Strike at every ``every``-th operation from the ``first`` on."""
    out = struck.folder / "out"
    figures = Figures(name, mode)
    fresh(scenario, out)
    code, said, operations = struck.run(scenario.arguments, out, 0)
    assert code == 0, said
    expected = scenario.kept(out)
    places = range(first, operations + 1, every)
    for n in [1] if mode == "no-locks" else places:
        fresh(scenario, out)
        code, said, _ = struck.run(scenario.arguments, out, MODES[mode], n)
        figures.faults += 1
        figures.told += code in (1, 2)
        problem = judge(struck, scenario, out, expected, mode, code, said)
        figures.recovered += problem is None
        if problem is not None:
            figures.wrong.append(f"operation {n} of {operations}: {problem}")
    return figures


def fresh(scenario: Scenario, out: Path) -> None:
    """An empty place for a command."""
    shutil.rmtree(out, ignore_errors=True)
    scenario.before(out)


def moments(struck: Struck, name: str, scenario: Scenario, count: int, seed: int) -> Figures:
    """kill -9 of the command and all that it started, at random times of its life."""
    out, figures = struck.folder / "out", Figures(name, "moments")
    fresh(scenario, out)
    started = time.monotonic()
    assert struck.run(scenario.arguments, out)[0] == 0
    life, expected = time.monotonic() - started, scenario.kept(out)
    draw = random.Random(seed)
    for _ in range(count):
        fresh(scenario, out)
        child = os.fork()
        if child == 0:
            os.setsid()
            arguments = [part.replace("{out}", str(out)) for part in scenario.arguments]
            struck._child(arguments, out, -1, 0)
        time.sleep(draw.uniform(0, life))
        with suppress(ProcessLookupError):  # it may not lead a group yet
            os.killpg(child, signal.SIGKILL)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        figures.faults += 1
        problem = judge(struck, scenario, out, expected, "kill", -signal.SIGKILL, "")
        figures.recovered += problem is None
        if problem is not None:
            figures.wrong.append(problem)
    return figures


def make_inputs(folder: Path, struck: Struck) -> None:
    """Models, rows, a cache, and a run that is half done."""
    sys.path.insert(0, str(HERE.parent / "kdrun"))
    from words import CHAT, WORDS, save_model, save_rows, save_tokenizer, usual_rows

    for name, seed in (("teacher", 1), ("student", 2)):
        save_model(folder / name, len(WORDS) + 1, seed)
        save_tokenizer(folder / name, ("<end>",), CHAT)
    save_rows(folder / "rows.jsonl", usual_rows())
    train = scenarios(folder)["train"].arguments
    whole = folder / "cache"
    code, said, _ = struck.run(scenarios(folder)["cache"].arguments, whole)
    assert code == 0, said
    half = [
        *train[: train.index("--max-steps")],
        "--max-steps",
        "2",
        "--output",
        str(folder / "half"),
    ]
    code, said, _ = struck.run(half, folder / "half")
    assert code == 0, said


def main() -> None:
    """Start under the shim, import, and strike."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("scenario")
    parser.add_argument("mode", choices=[*MODES, "moments"])
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--count", type=int, default=20, help="of moments")
    parser.add_argument("--seed", type=int, default=0, help="of moments")
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    folder = Path(os.environ.get("KDRUN_FAULTS") or tempfile.mkdtemp(prefix="faults"))
    if "KDRUN_FAULTS" not in os.environ:
        library = build_shim(folder)
        if library is None:
            sys.exit("no C compiler")
        environment = os.environ | {"KDRUN_FAULTS": str(folder), "LD_PRELOAD": str(library)}
        environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    os.environ.pop("LD_PRELOAD")
    from kdrun.quiet import quiet_environment

    quiet_environment()
    import peft  # noqa: F401 - what a command spends its first seconds on
    import transformers.models.llama.modeling_llama  # noqa: F401

    import kdrun.training.trainer  # noqa: F401

    write_every_batch()
    struck = Struck(folder)
    struck.arm_with(str(folder / "shim.so"))
    gc.freeze()
    make_inputs(folder, struck)
    scenario = scenarios(folder)[given.scenario]
    if given.mode == "moments":
        figures = moments(struck, given.scenario, scenario, given.count, given.seed)
    else:
        figures = campaign(struck, given.scenario, scenario, given.mode, given.first, given.every)
    text = json.dumps(vars(figures), indent=2)
    if given.report is not None:
        given.report.write_text(text + "\n", encoding="utf-8")
    print(text)
    shutil.rmtree(folder)
    sys.exit(bool(figures.wrong))


if __name__ == "__main__":
    main()
