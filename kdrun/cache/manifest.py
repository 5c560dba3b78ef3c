"""The plan and the manifest of a cache, and the check that the cache is complete."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdrun.cache.fingerprint import TeacherPrint, TokenizerPrint
from kdrun.errors import InputError
from kdrun.files import LOCK
from kdrun.paths import did_you_mean

MANIFEST = "manifest.json"
PLAN = "plan.json"
HEAD = "head.safetensors"
FORMAT = 1

Kind = Literal["hidden", "top_k", "sampled"]
DType = Literal["float32", "bfloat16", "float16"]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StoredFile(_Data):
    """A file of the cache.

    Attributes:
        name: name in the cache's folder.
        bytes: size of the file, to detect truncation.
        rows: number of rows in the file; 0 for the head.
    """

    name: str = Field(pattern=r"^\w[\w.-]*$")  # no path outside the folder
    bytes: int
    rows: int = 0


class Content(_Data):
    """What a cache contains, known before the teacher runs.

    Attributes:
        format: version of the layout.
        kind: ``hidden`` (last hidden states; exact), ``top_k`` or ``sampled``.
        teacher_name: name of the teacher as given by the user, for messages.
        teacher: fingerprint of the teacher.
        tokenizer: fingerprint of the tokenizer that encoded the rows.
        dtype: data type of the teacher and of the stored hidden states and head. Log-probabilities
            have the type that their file says.
        logit_scale: factor on the logits (``hidden``).
        softcap: bound of the logits, or None (``hidden``).
        vocab_size: number of tokens that teacher and tokenizer share; compressed kinds are cut to
            it.
        entries: stored entries per token: width of the hidden states, k, or number of draws.
        temperature: temperature of the log-probabilities (compressed kinds).
        seed: seed of the draws (``sampled``).
        max_length: maximum length of the rows.
        date: the date in the rows, if the chat template includes one.
        rows: number of distinct rows.
        tokens: number of supervised positions.
    """

    format: int = FORMAT
    kind: Kind
    teacher_name: str
    teacher: TeacherPrint
    tokenizer: TokenizerPrint
    dtype: DType
    logit_scale: float = 1.0
    softcap: float | None = None
    vocab_size: int
    entries: int
    temperature: float | None = None
    seed: int | None = None
    max_length: int
    date: str | None = None
    rows: int
    tokens: int


class Plan(Content):
    """What a build will write. It is stored first, so that an interrupted build can be continued.

    Attributes:
        batch_size: rows per batch of the teacher, whose rounding depends on it.
        keys: hash of the keys of all rows, in order.
    """

    batch_size: int
    keys: str


class Manifest(Content):
    """The content of a cache. It is written last, so a cache without a manifest is incomplete.

    Attributes:
        kept_mass: mean share of the teacher's probability that the k tokens cover (``top_k``).
        head: file of the output head (``hidden``).
        shards: files of the rows.
    """

    kept_mass: float | None = None
    head: StoredFile | None = None
    shards: tuple[StoredFile, ...]

    @property
    def exact(self) -> bool:
        """Whether the cache gives the teacher's full distributions."""
        return self.kind == "hidden"

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """All files except the manifest."""
        return self.shards if self.head is None else (self.head, *self.shards)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a cache and check that all its files are complete.

    Raises:
        InputError: the cache is missing, incomplete, damaged or from another version.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f"{folder}: no such cache{did_you_mean(folder)}")
    if not path.is_file():
        if is_unfinished(folder):
            raise InputError(
                f"{folder} is incomplete (it has no {MANIFEST}); give the kdrun cache-teacher "
                "command of its build again, which continues it"
            )
        raise InputError(
            f"{folder} is not a teacher cache (it has no {MANIFEST}); build one with kdrun "
            "cache-teacher"
        )
    try:
        manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        reason = (
            error.errors()[0]["msg"] if isinstance(error, ValidationError) else "it is not UTF-8"
        )
        raise InputError(f"{path}: unreadable ({reason}); build the cache again") from error
    if manifest.format != FORMAT:
        raise InputError(
            f"{path}: has format {manifest.format}, but this version reads {FORMAT}; build the "
            "cache again"
        )
    for file in manifest.files:
        _check_size(folder / file.name, file.bytes)
    return manifest


def is_unfinished(folder: Path) -> bool:
    """Whether a folder contains only files of an interrupted build."""
    names = [entry.name for entry in folder.iterdir() if entry.name != LOCK]
    return bool(names) and all(_is_ours(name) for name in names) and MANIFEST not in names


def shard_name(number: int) -> str:
    """The file name of a shard, numbered from 1."""
    return f"rows-{number:05d}.safetensors"


def shard_files(folder: Path) -> list[Path]:
    """The complete files of rows in a folder, in the order of their numbers."""
    return sorted(folder.glob("rows-*.safetensors"))


def _is_ours(name: str) -> bool:
    plain = name.removeprefix(".").removesuffix(".partial")
    return plain in (MANIFEST, PLAN, HEAD) or (
        plain.startswith("rows-") and plain.endswith(".safetensors")
    )


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise InputError(f"{path} is missing; build the cache again")
    size = path.stat().st_size
    if size != expected:
        what = "truncated" if size < expected else "changed"
        raise InputError(
            f"{path} is {what} ({size} bytes instead of {expected}); build the cache again"
        )
