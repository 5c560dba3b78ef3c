"""Continue prompts token by token, with one model or a mixture of several.

``model.generate`` uses torch's global generator, keeps finished rows in the batch, and does not
support mixtures of models. Here each row has its own random numbers, so its text does not depend on
the batch or the process, and finished rows leave the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kdrun.errors import TrainingError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Writer:
    """A model that generates text, alone or as part of a mixture.

    Attributes:
        model: a causal language model.
        weight: its share of the mixture; the shares sum to 1.
    """

    model: Any
    weight: float = 1.0


@dataclass
class Written:
    """A continuation.

    Attributes:
        tokens: the new token ids, including the end token if it was drawn.
        drawn: log-probability of each token under the sampling distribution.
        log_probs: log-probabilities of the tokens for each writer, at temperature 1.
    """

    tokens: list[int] = field(default_factory=list)
    drawn: list[float] = field(default_factory=list)
    log_probs: tuple[list[float], ...] = ()


@dataclass(frozen=True)
class Draw:
    """How a token is sampled from a distribution.

    Attributes:
        temperature: temperature of each writer; 0 selects the most likely token.
        top_p: keep the most likely tokens up to this total probability; 1 keeps all.
        top_k: keep this many most likely tokens; 0 keeps all.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


def decode(
    writers: Sequence[Writer],
    prompts: Sequence[Sequence[int]],
    uniforms: Tensor,
    *,
    max_new_tokens: int,
    draw: Draw,
    stops: set[int],
    pad: int,
    vocab_size: int,
    with_log_probs: bool = False,
) -> list[Written]:
    """Continue prompts without recording gradients.

    Args:
        writers: the models, on any devices; temporarily set to evaluation mode.
        prompts: non-empty lists of token ids.
        uniforms: random numbers of each row in [0, 1), ``[prompts, max_new_tokens]``.
        max_new_tokens: maximum length of a continuation.
        draw: how tokens are sampled.
        stops: tokens that end a continuation.
        pad: token for padding shorter prompts on the left.
        vocab_size: heads are cut to this many tokens.
        with_log_probs: whether to keep the log-probabilities of the drawn tokens.

    Returns:
        A continuation for each prompt, in the same order.

    Raises:
        TrainingError: a writer's probabilities are NaN.
    """
    import torch

    found = [Written(log_probs=tuple([] for _ in writers)) for _ in prompts]
    if not prompts:
        return found
    device = writers[0].model.device
    uniforms = uniforms.to(device)
    batch = _Batch.of(prompts, pad, device)
    with _evaluation([writer.model for writer in writers]), torch.no_grad():
        voices = [_Voice(writer, vocab_size) for writer in writers]
        for step in range(max_new_tokens):
            scores = [voice.scores(batch) for voice in voices]
            mixed = _mix(scores, [writer.weight for writer in writers], draw.temperature)
            tokens, kept = _take(mixed, uniforms[batch.rows, step], draw)
            columns = []
            if with_log_probs:
                index = tokens.clamp_min(0).unsqueeze(1)
                found_at = [x.log_softmax(-1).gather(1, index) for x in (kept, *scores)]
                columns = torch.cat(found_at, 1).T.tolist()
            for place, token in enumerate(tokens.tolist()):
                if batch.ended[place]:
                    continue
                if token < 0:
                    raise TrainingError(
                        "the probabilities became NaN while sampling an answer; lower optimizer.lr"
                    )
                written = found[batch.numbers[place]]
                written.tokens.append(token)
                if with_log_probs:
                    written.drawn.append(columns[0][place])
                    for own, column in zip(written.log_probs, columns[1:], strict=True):
                        own.append(column[place])
                batch.ended[place] = token in stops
            left = batch.ended.count(False)
            if left == 0:
                break
            batch.extend(tokens.clamp_min(0))
            if left <= len(batch.ended) // 2:  # copying the caches is only worthwhile from here on
                keep = batch.leave()
                for voice in voices:
                    voice.select(keep)
    return found


@dataclass
class _Batch:
    """The unfinished rows, their next inputs, and their positions in the output."""

    ids: Tensor
    mask: Tensor
    positions: Tensor
    rows: Tensor
    numbers: list[int]
    ended: list[bool]

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> _Batch:
        import torch

        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        count = len(prompts)
        return cls(
            ids.to(device),
            mask.to(device),
            positions.to(device),
            torch.arange(count, device=device),
            list(range(count)),
            [False] * count,
        )

    def extend(self, tokens: Tensor) -> None:
        """Set the new tokens as the next inputs."""
        import torch

        self.ids = tokens.unsqueeze(1)
        self.mask = torch.cat([self.mask, torch.ones_like(self.ids)], 1)
        self.positions = self.positions[:, -1:] + 1

    def leave(self) -> Tensor:
        """Drop finished rows; returns the indices of the others."""
        import torch

        places = [place for place, ended in enumerate(self.ended) if not ended]
        keep = torch.tensor(places, device=self.ids.device)
        self.ids, self.mask = self.ids[keep], self.mask[keep]
        self.positions, self.rows = self.positions[keep], self.rows[keep]
        self.numbers = [self.numbers[place] for place in places]
        self.ended = [False] * len(places)
        return keep


class _Voice:
    """A writer with its key-value cache."""

    def __init__(self, writer: Writer, vocab_size: int) -> None:
        self._model = writer.model
        self._vocab_size = vocab_size
        self._cache: Any = None
        accepted = inspect.signature(writer.model.forward).parameters
        self._places = "position_ids" in accepted
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        # transformers 5.24 renamed this argument; remote code may still use the old name.
        self._name = "cache" if "cache" in accepted else "past_key_values"

    def scores(self, batch: _Batch) -> Tensor:
        """Logits ``[rows, vocabulary]`` of the next token, float32 or wider."""
        import torch

        device = self._model.device
        places = {"position_ids": batch.positions.to(device)} if self._places else {}
        past = {} if self._cache is None else {self._name: self._cache}
        out = self._model(
            input_ids=batch.ids.to(device),
            attention_mask=batch.mask.to(device),
            use_cache=True,
            **places,
            **past,
            **self._last,
        )
        self._cache = getattr(out, self._name)
        if not hasattr(self._cache, "batch_select_indices"):
            raise TrainingError(
                f"{type(self._model).__name__} uses a {type(self._cache).__name__}, which is not "
                "supported for sampling answers"
            )
        logits: Tensor = out.logits[:, -1, : self._vocab_size].to(batch.ids.device)
        return logits if logits.dtype == torch.float64 else logits.float()

    def select(self, keep: Tensor) -> None:
        # A cache may be on several devices; all of them take indices from the CPU.
        elsewhere = keep.device != self._model.device or hasattr(self._model, "hf_device_map")
        self._cache.batch_select_indices(keep.cpu() if elsewhere else keep)


def _mix(scores: Sequence[Tensor], weights: Sequence[float], temperature: float) -> Tensor:
    """Scores of the mixture, up to a constant per row."""
    import math

    import torch

    softened = [x if temperature in (0.0, 1.0) else x / temperature for x in scores]
    if len(softened) == 1:
        return softened[0]
    shares = [
        x.log_softmax(-1) + math.log(weight)
        for x, weight in zip(softened, weights, strict=True)
        if weight > 0
    ]
    return torch.stack(shares).logsumexp(0)


def _take(scores: Tensor, uniforms: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """Sample a token per row (-1 if its scores are NaN); also returns the truncated scores."""
    import torch

    if draw.temperature == 0:
        tokens = scores.argmax(-1, keepdim=True)
        bad = scores.gather(1, tokens).isnan()
        return torch.where(bad, -1, tokens).squeeze(1), scores
    kept = _truncate(scores, draw)
    heights = kept.softmax(-1).cumsum(-1)
    total = heights[:, -1:]
    # Stay just below the total, so that a final token with probability 0 is never drawn.
    level = (uniforms.to(scores.dtype).unsqueeze(1) * total).minimum(
        torch.nextafter(total, torch.zeros_like(total))
    )
    tokens = torch.searchsorted(heights, level, right=True).clamp_max(scores.shape[1] - 1)
    return torch.where(total.isnan(), -1, tokens).squeeze(1), kept


def _truncate(scores: Tensor, draw: Draw) -> Tensor:
    import torch

    if 0 < draw.top_k < scores.shape[1]:
        lowest = scores.topk(draw.top_k, -1).values[:, -1:]
        scores = scores.masked_fill(scores < lowest, -torch.inf)
    if draw.top_p < 1:
        ordered, order = scores.softmax(-1).sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= draw.top_p
        scores = scores.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return scores


@contextmanager
def _evaluation(models: Sequence[Any]) -> Iterator[None]:
    """Temporarily set models to evaluation mode."""
    training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, before in zip(models, training, strict=True):
            model.train(before)
