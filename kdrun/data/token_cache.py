"""Cache of tokenised rows on disk, for the next run on the same rows.

The name of a file is a hash of everything that its content depends on: the rows, the tokenizer,
its chat template, the settings, and the code that encodes. A changed tokenizer, an edited row or a
new version uses another file, never a stale one. Files may be removed at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from kdrun.data.chat import Rendering, uses_date
from kdrun.data.collate import IGNORE_INDEX
from kdrun.data.encode import LongRows, encode
from kdrun.data.encoding import Encoding, Example
from kdrun.data.formats import ChatRow
from kdrun.errors import InputError
from kdrun.paths import expand_home

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

_NONE = "none"
_WORTHWHILE = 500_000  # characters: about a second of work
_CODE = (
    "chat.py",
    "encode.py",
    "encode_report.py",
    "encoding.py",
    "lost.py",
    "messages.py",
    "token_cache.py",
    "turn_ends.py",
    "windows.py",
)
"""The source files that determine the encoding and its cache."""


@dataclass(frozen=True)
class TokenCache:
    """A folder of tokenised rows.

    Attributes:
        folder: Created when the first file is written.
        everything: Also keep small sets of rows, which are quick to encode again.
    """

    folder: Path
    everything: bool = True

    @classmethod
    def at(cls, given: str | None) -> TokenCache | None:
        """Return the cache of ``data.cache_dir``.

        Args:
            given: a folder; ``none``; or None for the user's cache folder, which keeps only
                large sets of rows.

        Raises:
            InputError: the folder cannot be written.
        """
        if given == _NONE:
            return None
        if given is None:
            base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
            if base.startswith("~"):  # users in containers may have no home folder
                return None
            return cls(Path(base) / "kdrun" / "tokens", everything=False)
        folder = expand_home(given)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"data.cache_dir={given}: {error.strerror}; choose a writable folder"
            ) from error
        return cls(folder)

    def chats(
        self,
        rows: Sequence[ChatRow],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        long_rows: LongRows,
        rendering: Rendering,
    ) -> Encoding:
        """Like `kdrun.data.encode.encode`."""
        content = [[[m.role, m.content, m.learned] for m in row.messages] for row in rows]
        size = sum(len(m.content) for row in rows for m in row.messages)
        day = (rendering.date or date.today().isoformat()) if uses_date(tokenizer) else None
        file = self._file(
            tokenizer, size, [content, max_length, long_rows, rendering.rendered, day]
        )
        if file is None:
            return encode(rows, tokenizer, max_length, long_rows, rendering)
        found = _read(file)
        if found is not None:
            return _unpack(*found)
        encoding = encode(rows, tokenizer, max_length, long_rows, rendering)
        if encoding.examples:
            _write(file, *_pack(encoding))
        return encoding

    def text(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Like `kdrun.data.windows.concatenate`."""
        from kdrun.data.windows import concatenate

        file = self._file(tokenizer, sum(map(len, texts)), list(texts))
        found = None if file is None else _read(file)
        if found is not None:
            tokens: list[int] = found[0]["ids"].tolist()
            return tokens
        tokens = concatenate(texts, tokenizer)
        if file is not None:
            _write(file, {"ids": _ints(tokens)}, {})
        return tokens

    def _file(self, tokenizer: PreTrainedTokenizerBase, size: int, what: Any) -> Path | None:
        """Return the file of the rows; None if they are not cached."""
        # The content of a tokenizer written in Python does not determine its behaviour.
        if not tokenizer.is_fast or (size < _WORTHWHILE and not self.everything):
            return None
        key = hashlib.sha256(_print_code().encode())
        key.update(_print_tokenizer(tokenizer))
        key.update(json.dumps(what).encode())
        return self.folder / f"{key.hexdigest()[:40]}.safetensors"


@lru_cache
def _print_code() -> str:
    """Hash the code that encodes, here and in the libraries that it uses."""
    here = Path(__file__).parent
    digest = hashlib.sha256(b"".join((here / name).read_bytes() for name in _CODE))
    versions = [version(name) for name in ("transformers", "tokenizers", "jinja2")]
    return json.dumps([digest.hexdigest(), *versions])


def _print_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """Hash a tokenizer's full content, with its chat template and special tokens."""
    template = json.dumps(tokenizer.chat_template)
    content = [
        tokenizer.backend_tokenizer.to_str(),
        json.dumps(tokenizer.special_tokens_map, default=str, sort_keys=True),
        template,
    ]
    return hashlib.sha256(json.dumps(content).encode()).digest()


def _ints(values: Sequence[int]) -> np.ndarray:
    import numpy as np

    return np.asarray(values, dtype=np.int32)


def _pack(encoding: Encoding) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    import numpy as np

    ids = [token for example in encoding.examples for token in example["input_ids"]]
    labels = [label for example in encoding.examples for label in example["labels"]]
    arrays = {
        "ids": _ints(ids),
        "supervised": (_ints(labels) != IGNORE_INDEX).astype(np.uint8),
        "lengths": _ints([len(example["input_ids"]) for example in encoding.examples]),
    }
    names = ("skipped", "cut", "lost", "controls", "shortest", "supervised")
    return arrays, {name: getattr(encoding, name) for name in names}


def _unpack(arrays: dict[str, np.ndarray], rest: dict[str, Any]) -> Encoding:
    return Encoding(
        examples=_Stored(arrays),
        skipped=[(number, reason) for number, reason in rest["skipped"]],
        cut=rest["cut"],
        lost=[(number, kind) for number, kind in rest["lost"]],
        controls=[(number, token) for number, token in rest["controls"]],
        shortest=tuple(rest["shortest"]),
        tokens=len(arrays["ids"]),
        supervised=rest["supervised"],
    )


class _Stored(Sequence[Example]):
    """Examples in flat arrays, converted to lists on access: converting all rows at once would
    take longer than everything else.
    """

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self._ids, self._supervised = arrays["ids"], arrays["supervised"]
        self._stops = [0, *arrays["lengths"].cumsum().tolist()]

    def __len__(self) -> int:
        return len(self._stops) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Return one example, or a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        part = slice(self._stops[number], self._stops[number + 1])
        ids: list[int] = self._ids[part].tolist()
        kept = self._supervised[part].tolist()
        labels = [token if k else IGNORE_INDEX for token, k in zip(ids, kept, strict=True)]
        return Example(input_ids=ids, labels=labels)


def _read(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Read a file's arrays and the rest; None if it is absent or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as opened:
            rest = json.loads((opened.metadata() or {})["rest"])
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return arrays, rest


def _write(file: Path, arrays: dict[str, np.ndarray], rest: dict[str, Any]) -> None:
    """Write a file atomically; without space or permission, nothing is kept."""
    from safetensors.numpy import save

    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(save(arrays, metadata={"rest": json.dumps(rest)}))
        os.replace(partial, file)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
