"""The split of models into backbone and head, on tiny models of thirteen families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import kdlosses
from kdrun.models.heads import FrozenTeacher, call, find_split, install, uninstall

VOCAB = 37
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**COMMON, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", COMMON),
    "qwen3": ("Qwen3", {**COMMON, "head_dim": 8}),
    "mistral": ("Mistral", COMMON),
    "gemma2": (
        "Gemma2",
        {**COMMON, "head_dim": 8, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
    ),
    "gemma3": (
        "Gemma3",
        {**COMMON, "head_dim": 8, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
    ),
    "granite": ("Granite", {**COMMON, "logits_scaling": 8.0}),
    "cohere": ("Cohere", {**COMMON, "logit_scale": 0.25}),
    "gpt2": ("GPT2LMHead", GPT2),
    "gpt_neox": ("GPTNeoX", {k: v for k, v in COMMON.items() if k != "num_key_value_heads"}),
    "phi3": ("Phi3", COMMON),
    "olmo2": ("Olmo2", COMMON),
    "smollm3": ("SmolLM3", COMMON),
}
SCALED = {
    "gemma2": (1.0, 0.5),
    "gemma3": (1.0, 0.5),
    "granite": (0.125, None),
    "cohere": (0.25, None),
}


def make(family: str, seed: int) -> Any:
    name, options = FAMILIES[family]
    base = name.removesuffix("LMHead")
    config_class = getattr(
        transformers, "Gemma3TextConfig" if family == "gemma3" else f"{base}Config"
    )
    model_class = getattr(
        transformers, f"{name}Model" if family == "gpt2" else f"{name}ForCausalLM"
    )
    torch.manual_seed(seed)
    model = model_class(config_class(**options))
    with torch.no_grad():  # random heads of default scale make all logits alike
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_through_the_split_equals_plain_on_the_models_own_logits(family: str) -> None:
    teacher, student = make(family, 0), make(family, 1)
    ids = torch.randint(3, VOCAB, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100).masked_fill(mask == 0, -100)

    plain = kdlosses.KDObjective(kdlosses.get_loss("forward_kl"), 0.5)
    with torch.no_grad():
        teacher_logits = teacher(input_ids=ids, attention_mask=mask).logits
    expected = plain(student(input_ids=ids, attention_mask=mask).logits, teacher_logits, labels)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()

    split = find_split(student)
    assert split.reason is None
    assert (split.logit_scale, split.softcap) == SCALED.get(family, (1.0, None))
    install(student, split)
    source = FrozenTeacher(teacher, find_split(teacher)).source(input_ids=ids, attention_mask=mask)
    assert isinstance(source, kdlosses.Projected)
    chunked = kdlosses.KDObjective(
        kdlosses.get_loss("forward_kl_chunked", chunk_size=5, compiled=False), 0.5
    )

    def consume(found: Any) -> dict[str, torch.Tensor]:
        assert isinstance(found, kdlosses.Projected)
        return {"loss": chunked(found, source, labels).loss}

    loss = call(student, consume, input_ids=ids, attention_mask=mask)["loss"]
    loss.backward()
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=0)
    for name, parameter in student.named_parameters():
        scale = gradients[name].abs().max().item()
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-5, atol=1e-6 * max(scale, 1e-3)
        )


def test_an_unknown_postprocessing_is_found_by_the_probe() -> None:
    class Shifted(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits * 1.5
            return outputs

    torch.manual_seed(0)
    model = Shifted(transformers.LlamaConfig(**COMMON)).eval()
    split = find_split(model)
    assert split.reason is not None
    assert "changes its logits" in split.reason

    install(model, split)
    ids = torch.randint(3, VOCAB, (2, 5))
    expected = model(input_ids=ids).logits
    seen: list[Any] = []

    def consume(found: Any) -> dict[str, torch.Tensor]:
        seen.append(found)
        return {}

    call(model, consume, input_ids=ids, attention_mask=torch.ones_like(ids))
    assert isinstance(seen[0], kdlosses.Logits)
    torch.testing.assert_close(seen[0].values, expected)


class ScaledInput(transformers.LlamaForCausalLM):
    """Divides the head's input by ``logits_scaling``, as MiniCPM3 does."""

    def forward(self, input_ids: Any, use_cache: bool = False) -> Any:
        hidden = self.model(input_ids=input_ids, use_cache=use_cache).last_hidden_state
        logits = self.lm_head(hidden / self.config.logits_scaling)
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)


def test_a_scale_of_the_heads_input_is_one_of_its_output_only_without_a_bias() -> None:
    torch.manual_seed(0)
    model = ScaledInput(transformers.LlamaConfig(**COMMON, logits_scaling=8.0)).eval()
    split = find_split(model)
    assert (split.reason, split.logit_scale, split.backbone) == (None, 0.125, "model")
    model.lm_head = torch.nn.Linear(COMMON["hidden_size"], VOCAB)
    reason = find_split(model).reason
    assert reason is not None
    assert "changes its logits" in reason


class Wrapped(torch.nn.Module):
    """Hands its inputs on, without names of its own."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.decoder(*args, **kwargs)


def test_inputs_reach_a_backbone_inside_a_wrapper_without_named_inputs() -> None:
    model = make("llama", 0)
    ids = torch.randint(3, VOCAB, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    expected = model(input_ids=ids, attention_mask=mask).logits
    head = model.lm_head
    model.model = Wrapped(model.model)
    model.get_output_embeddings = lambda: head
    split = find_split(model)
    assert (split.reason, split.backbone) == (None, "model.decoder")
    install(model, split)

    def consume(found: Any) -> dict[str, torch.Tensor]:
        return {"logits": found.hidden @ found.weight.T}

    got = call(model, consume, input_ids=ids, attention_mask=mask)["logits"]
    torch.testing.assert_close(got, expected)


def test_the_probe_of_a_double_precision_model_is_strict() -> None:
    class Off(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits * 1.01
            return outputs

    torch.manual_seed(0)
    model = Off(transformers.LlamaConfig(**COMMON)).double().eval()
    assert find_split(model).reason is not None


def test_a_head_with_a_bias_is_split_with_it() -> None:
    torch.manual_seed(0)
    model = transformers.PhiForCausalLM(
        transformers.PhiConfig(**{k: v for k, v in COMMON.items() if k != "num_key_value_heads"})
    ).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    split = find_split(model)
    assert split.reason is None
    install(model, split)
    ids = torch.randint(3, VOCAB, (2, 5))
    expected = model(input_ids=ids).logits

    def consume(found: Any) -> dict[str, torch.Tensor]:
        return {"logits": found.hidden @ found.weight.T + found.bias}

    got = call(model, consume, input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
    torch.testing.assert_close(got, expected)


def test_install_changes_nothing_for_other_callers_and_can_be_undone() -> None:
    model = make("llama", 0)
    ids = torch.randint(3, VOCAB, (2, 5))
    before = model(input_ids=ids, labels=ids)
    install(model, find_split(model))
    after = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(after.loss, before.loss, rtol=0, atol=0)
    uninstall(model)
    assert "forward" not in vars(model)


def test_r8_the_teacher_stays_in_eval_mode_and_gives_the_same_twice() -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**COMMON, attention_dropout=0.5)
    ).train()
    teacher = FrozenTeacher(model, find_split(model))
    ids = torch.randint(3, VOCAB, (2, 5))
    mask = torch.ones_like(ids)
    first = teacher.source(input_ids=ids, attention_mask=mask).hidden
    model.train()
    second = teacher.source(input_ids=ids, attention_mask=mask).hidden
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert not any(parameter.requires_grad for parameter in model.parameters())
