"""Continuations against model.generate, enumerated distributions and transformers' warpers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from kdrun.errors import TrainingError
from kdrun.procedures.decode import Draw, Writer, _truncate, decode
from kdrun.procedures.sampling import uniforms

VOCAB = 31
PROMPTS = [[3, 4, 5], [7], [8, 9, 10, 11, 12, 13], [14, 15], [6, 6, 6, 6]]


def model(seed: int, kind: str = "llama") -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB + 2, "initializer_range": 0.4}
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, **sizes)
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, **sizes
    )
    return transformers.LlamaForCausalLM(config).eval()


def run(writers: list[Writer], prompts: list[list[int]] = PROMPTS, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "max_new_tokens": 9,
        "draw": Draw(),
        "stops": {2, 17},
        "pad": 0,
        "vocab_size": VOCAB,
        **options,
    }
    rows = settings.pop("rows", range(len(prompts)))
    numbers = uniforms(1, 2, list(rows), settings["max_new_tokens"], "answer")
    return decode(writers, prompts, numbers, **settings)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_greedy_continuations_are_those_of_generate_row_by_row(kind: str) -> None:
    net = model(0, kind)
    ends = set()
    for stops in ({2, 17}, {5, 11, 23}):
        found = run([Writer(net)], draw=Draw(temperature=0), stops=stops)
        for prompt, text in zip(PROMPTS, found, strict=True):
            expected = net.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                generation_config=transformers.GenerationConfig(
                    max_new_tokens=9,
                    do_sample=False,
                    eos_token_id=sorted(stops),
                    pad_token_id=0,
                    suppress_tokens=[VOCAB, VOCAB + 1],
                ),
            )[0, len(prompt) :].tolist()
            assert text.tokens == expected
            ends.add(text.tokens[-1] in stops)
    assert ends == {True, False}  # some rows end early, some are cut


def test_a_row_is_the_same_alone_and_in_any_batch() -> None:
    net, stops = model(1), set(range(2, VOCAB, 4))
    together = run([Writer(net)], stops=stops)
    for number, prompt in enumerate(PROMPTS):
        (alone,) = run([Writer(net)], [prompt], rows=[number], stops=stops)
        assert alone.tokens == together[number].tokens
    assert len({len(text.tokens) for text in together}) > 1  # rows left the batch on the way
    for text in together:
        assert not stops.intersection(text.tokens[:-1])


def test_training_mode_and_the_global_generator_are_left_as_they_were() -> None:
    net = model(1).train()
    before = torch.get_rng_state()
    run([Writer(net)])
    assert net.training
    assert torch.equal(torch.get_rng_state(), before)


def test_the_frequencies_are_those_of_the_enumerated_answers(table: Callable[..., Any]) -> None:
    student, teacher = table(0), table(1)
    count, share = 20000, 0.3
    writers = [Writer(student, 1 - share), Writer(teacher, share)]
    found = run(
        writers,
        [[1]] * count,
        max_new_tokens=2,
        stops={3},
        vocab_size=4,
        with_log_probs=True,
    )
    q, p = (net.logits.detach().softmax(-1) for net in (student, teacher))
    mixed = (1 - share) * q + share * p
    expected = {(3,): mixed[1, 3]}
    for first in range(3):
        for second in range(4):
            expected[first, second] = mixed[1, first] * mixed[first, second]
    seen = Counter(tuple(text.tokens) for text in found)
    assert set(seen) == set(expected)
    for tokens, probability in expected.items():
        error = (probability * (1 - probability) / count).sqrt()
        assert abs(seen[tokens] / count - probability) < 4.5 * error, tokens
    for text in found[:50]:
        path = [1, *text.tokens]
        steps = list(itertools.pairwise(path))
        assert text.drawn == pytest.approx([mixed[a, b].log().item() for a, b in steps])
        assert text.log_probs[0] == pytest.approx([q[a, b].log().item() for a, b in steps])
        assert text.log_probs[1] == pytest.approx([p[a, b].log().item() for a, b in steps])


@pytest.mark.parametrize(("top_p", "top_k"), [(0.7, 0), (1.0, 5), (0.4, 9), (1e-6, 0)])
def test_truncation_is_that_of_transformers(top_p: float, top_k: int) -> None:
    scores = 3 * torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(0))
    expected = scores
    if top_k:
        expected = transformers.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = transformers.TopPLogitsWarper(top_p)(None, expected)
    found = _truncate(scores, Draw(top_p=top_p, top_k=top_k))
    assert torch.equal(found.isinf(), expected.isinf())


def test_the_temperature_is_that_of_the_sampling(table: Callable[..., Any]) -> None:
    net = table(2)
    options: dict[str, Any] = {"max_new_tokens": 1, "stops": {3}, "vocab_size": 4}
    found = run(
        [Writer(net)], [[0]] * 20000, draw=Draw(temperature=0.5), with_log_probs=True, **options
    )
    expected = (net.logits.detach()[0] / 0.5).softmax(-1)
    seen = Counter(text.tokens[0] for text in found)
    for token in range(4):
        assert seen[token] / 20000 == pytest.approx(expected[token].item(), abs=0.02)
    text = found[0]
    assert text.drawn[0] == pytest.approx(expected[text.tokens[0]].log().item())
    assert text.log_probs[0][0] == pytest.approx(
        net.logits.detach()[0].log_softmax(-1)[text.tokens[0]].item()
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_probabilities_end_the_run(temperature: float) -> None:
    net = model(3)
    net.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="probabilities became NaN"):
        run([Writer(net)], draw=Draw(temperature=temperature))


def test_a_token_of_probability_0_is_never_drawn() -> None:
    from kdrun.procedures.decode import _take

    scores = torch.full((3, 6), -torch.inf)
    scores[:, 2:4] = 0.0
    tokens, kept = _take(scores, torch.tensor([0.0, 0.5, 1.0]), Draw())
    assert tokens.tolist() == [2, 3, 3]
    assert torch.equal(kept, scores)
