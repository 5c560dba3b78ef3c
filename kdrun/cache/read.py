"""Read a cache: rows by the hash of their content, from memory-mapped files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun.cache.fingerprint import TeacherPrint, TokenizerPrint, is_served
from kdrun.cache.manifest import HEAD, Manifest, StoredFile, read_manifest
from kdrun.cache.rounding import restore_top_k
from kdrun.cache.write import KEYS, STOPS, TENSORS
from kdrun.errors import InputError
from kdrun.paths import expand_home

if TYPE_CHECKING:
    from torch import Tensor


class Cache:
    """A complete cache. Shards are memory-mapped, and rows are read on demand.

    Args:
        folder: folder written by ``kdrun cache-teacher``.

    Raises:
        InputError: the cache is missing, incomplete or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = expand_home(folder)
        self.manifest: Manifest = read_manifest(self.folder)
        self._shards = [self._open(file) for file in self.manifest.shards]
        self._places: dict[bytes, tuple[int, int, int]] = {}
        for number, shard in enumerate(self._shards):
            start = 0
            keys, stops = shard.get_tensor(KEYS), shard.get_tensor(STOPS).tolist()
            for key, stop in zip(keys.numpy(), stops, strict=True):
                self._places[key.tobytes()] = (number, start, stop)
                start = stop
        if len(self._places) != self.manifest.rows:
            raise InputError(
                f"{self.folder} contains {len(self._places)} rows, but its manifest says "
                f"{self.manifest.rows}; build the cache again"
            )

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def read(self, key: bytes) -> tuple[Tensor, ...]:
        """Read the tensors of a row; the first axis is its supervised positions.

        Returns:
            Hidden states; or log-probabilities, indices and, for ``top_k``, the tail. Probabilities
            of ``top_k`` and its tail have a sum of 1, in float32.
        """
        number, start, stop = self._places[key]
        shard, kind = self._shards[number], self.manifest.kind
        stored = tuple(shard.get_slice(name)[start:stop] for name in TENSORS[kind])
        if kind != "top_k":
            return stored
        log_probs, indices, tail = stored
        log_probs, tail = restore_top_k(log_probs, tail)
        return log_probs, indices, tail

    def head(self) -> dict[str, Tensor]:
        """``weight`` and, if present, ``bias`` of the head; only for a cache of hidden states."""
        file = self._open(StoredFile(name=HEAD, bytes=0))
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping

    def check_tokenizer(self, given: TokenizerPrint) -> None:
        """Refuse a tokenizer that differs from the one that encoded the rows.

        Raises:
            InputError: vocabulary or chat template differ.
        """
        kept = self.manifest.tokenizer
        for name, what in (("vocabulary", "vocabulary"), ("chat_template", "chat template")):
            if getattr(given, name) != getattr(kept, name):
                raise InputError(
                    f"{self.folder} was built with another tokenizer: the {what} differs from the "
                    "student's; build the cache again with this student as --student"
                )

    def check_teacher(self, given: TeacherPrint, name: str) -> None:
        """Refuse a teacher that differs from the cached one.

        Raises:
            InputError: configuration or weights differ.
        """
        kept = self.manifest.teacher
        if is_served(kept):  # its weights were never seen
            return
        for part, what in (
            ("config", "configuration differs"),
            ("head", "output head differs"),
            ("parameters", "weights differ"),
        ):
            if getattr(given, part) != getattr(kept, part):
                raise InputError(
                    f"{self.folder} was built from another teacher "
                    f"({self.manifest.teacher_name}) than {name}: the {what}; build the "
                    "cache again, or remove --teacher"
                )

    def _open(self, file: StoredFile) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.folder / file.name, "pt")
        except SafetensorError as error:
            raise InputError(
                f"{self.folder / file.name} is damaged ({error}); build the cache again"
            ) from error
