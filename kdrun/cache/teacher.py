"""A teacher read from a cache instead of a live one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdlosses import Projected, Sampled, TopK
from kdrun.cache.fingerprint import print_tokenizer
from kdrun.cache.read import Cache
from kdrun.data.batch_rows import BatchRow, fill_columns, rows_of
from kdrun.data.collate import Collator, teacher_side
from kdrun.errors import InputError
from kdrun.models.heads import HeadSplit

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


_SHOWN_TOKENS = 16


class CachedTeacher:
    """A cache with the interface of :class:`kdrun.models.heads.FrozenTeacher`.

    Rows are found by their tokens and supervised positions, independent of order, batches and
    padding. Only supervised positions are filled; the others are zeros, which losses ignore.

    Args:
        cache: a complete cache.
        tokenizer: tokenizer of the rows; decodes refused rows for messages.
        dtype: data type of hidden states and head in training; log-probabilities are float32.

    Attributes:
        cache: the cache.
        split: how logits are computed.

    Raises:
        InputError: the tokenizer differs from the one that encoded the rows.
    """

    def __init__(
        self, cache: Cache, tokenizer: PreTrainedTokenizerBase, dtype: str = "float32"
    ) -> None:
        import torch

        cache.check_tokenizer(print_tokenizer(tokenizer))
        self.cache = cache
        self._tokenizer = tokenizer
        manifest = cache.manifest
        self.split = HeadSplit(manifest.logit_scale, manifest.softcap)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._device = torch.device("cpu")
        self._head: dict[str, Tensor] = {}
        if manifest.exact:
            self._head = {name: x.to(self._dtype) for name, x in cache.head().items()}

    @property
    def exact(self) -> bool:
        """Whether full distributions are available, which measures need."""
        return self.cache.manifest.exact

    @property
    def width(self) -> int:
        """Size of the output head, or of the compressed vocabulary."""
        if self.exact:
            return len(self._head["weight"])
        return self.cache.manifest.vocab_size

    def to(self, device: torch.device) -> None:
        """Set the device of sources, and move the head to it."""
        self._device = device
        self._head = {name: tensor.to(device) for name, tensor in self._head.items()}

    def missing(self, examples: Iterable[Mapping[str, Sequence[int]]]) -> str | None:
        """Describe the first row that the cache lacks; None if it contains all rows.

        A row is what the teacher reads: a cache is for its prompts, whatever the student reads.

        Args:
            examples: rows with ``input_ids`` and ``labels``, as the trainer collates them.
        """
        alone = Collator()
        for example in examples:
            batch = alone([teacher_side(example)])
            features = (batch["input_ids"], batch.get("attention_mask"), batch["shift_labels"])
            for row in rows_of(*features, batch.get("position_ids")):
                if row.key not in self.cache:
                    return self._lacks(row)
        return None

    def source(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        shift_labels: Tensor,
        position_ids: Tensor | None = None,
        **inputs: Any,
    ) -> Projected | TopK | Sampled:
        """The source of logits for a batch.

        Args:
            input_ids: ``[rows, length]``.
            attention_mask: same shape; 0 is padding, on either side.
            shift_labels: same shape, aligned with the logits; define the supervised positions.
            position_ids: positions of packed rows, whose examples were cached as rows.
            **inputs: further inputs of a live teacher, ignored.

        Raises:
            InputError: a row is not in the cache.
        """
        found: list[tuple[BatchRow, list[Tensor]]] = []
        for row in rows_of(input_ids, attention_mask, shift_labels, position_ids):
            if row.key not in self.cache:
                raise InputError(self._lacks(row))
            stored = self.cache.read(row.key)
            found.append((row, [part.to(self._type_of(part)) for part in stored]))
        columns = fill_columns(input_ids.shape, found)
        return self._source_of(columns or self._nothing(input_ids.shape))

    def empty_source(self, shape: torch.Size) -> Projected | TopK | Sampled:
        """Return a source without any row, which shows whether a loss supports such a teacher."""
        return self._source_of(self._nothing(shape))

    def _source_of(self, columns: Sequence[Tensor]) -> Projected | TopK | Sampled:
        manifest = self.cache.manifest
        columns = [column.to(self._device) for column in columns]
        if manifest.kind == "hidden":
            return Projected(
                columns[0],
                self._head["weight"],
                self._head.get("bias"),
                manifest.logit_scale,
                manifest.softcap,
            )
        assert manifest.temperature is not None
        if manifest.kind == "top_k":
            log_probs, indices, tail = columns
            return TopK(log_probs, indices, tail, manifest.vocab_size, manifest.temperature)
        log_probs, indices = columns
        return Sampled(log_probs, indices, manifest.vocab_size, manifest.temperature)

    def _type_of(self, part: Tensor) -> torch.dtype:
        import torch

        if not part.is_floating_point():
            return torch.int64
        return self._dtype if self.exact else torch.float32

    def _nothing(self, shape: torch.Size) -> list[Tensor]:
        import torch

        entries = (*shape, self.cache.manifest.entries)
        if self.exact:
            return [torch.zeros(entries, dtype=self._dtype)]
        tokens = torch.arange(self.cache.manifest.entries).expand(entries)
        found = [torch.zeros(entries), tokens.clone()]
        return [*found, torch.zeros(shape)] if self.cache.manifest.kind == "top_k" else found

    def _lacks(self, row: BatchRow) -> str:
        text = self._tokenizer.decode(row.ids[:_SHOWN_TOKENS])
        return (
            f"{self.cache.folder} lacks the row that begins {text!r} ({len(row.ids)} tokens, "
            f"{len(row.positions)} supervised): it was edited, is cut at another --max-length "
            f"(the cache has {self.cache.manifest.max_length}), or was never cached; build the "
            "cache again from this data"
        )
