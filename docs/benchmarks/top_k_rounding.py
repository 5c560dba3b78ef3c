"""How much a loss moves when the top k of a teacher is stored in 16 bits.

    python docs/benchmarks/top_k_rounding.py [MODEL ROWS]

The teachers are normal logits of three standard deviations, for 256 tokens of a vocabulary of
5000, and, if given, a model on the first six rows of a file. The student is the teacher with normal
noise.
Prints as CSV the loss in float64 without rounding, and the relative change.
"""

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import kdlosses
from kdrun.cache.rounding import restore_top_k, round_top_k


def main() -> None:
    """Print the table."""
    generator = torch.Generator().manual_seed(0)
    print("teacher,k,noise,loss,value,relative_change")
    for name, teacher in teachers(sys.argv[1:], generator):
        labels = torch.zeros(len(teacher), dtype=torch.int64)
        for noise in (0.03, 0.3, 2.0):
            student = teacher + noise * torch.randn(
                teacher.shape, generator=generator, dtype=torch.float64
            )
            for k in (20, 64, 128):
                whole = kdlosses.TopK.from_logits(teacher, k)
                log_probs, tail = restore_top_k(*round_top_k(whole.log_probs, whole.tail_log_prob))
                stored = kdlosses.TopK(log_probs, whole.indices, tail, whole.vocab_size)
                for spec in ("forward_kl", "reverse_kl", "generalized_jsd"):
                    loss = kdlosses.get_loss(spec)
                    exact = float(loss(student, whole, labels))
                    moved = float(loss(student.float(), stored, labels)) / exact - 1
                    print(f"{name},{k},{noise},{spec},{exact:.2e},{abs(moved):.1e}")


def teachers(given: list[str], generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Names and logits in float64."""
    for name, spread in (("usual", 2.5), ("peaked", 8.0), ("flat", 0.05)):
        yield name, spread * torch.randn(256, 5000, generator=generator, dtype=torch.float64)
    if given:
        yield given[0], logits_of(*given)


def logits_of(name: str, rows: str) -> Tensor:
    """A model's logits at the supervised tokens of a few rows, cut at 96 tokens."""
    from kdrun.data.collate import Collator
    from kdrun.data.encode import encode_chats
    from kdrun.data.rows import load_rows
    from kdrun.models.load import load_model
    from kdrun.models.locate import locate_model
    from kdrun.models.tokenizers import load_tokenizer

    source = locate_model(name)
    examples = encode_chats(load_rows(rows).rows[:6], load_tokenizer(source), 96).examples
    batch = Collator(0)(examples)
    with torch.no_grad():
        logits = load_model(source)(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits
    return logits[batch["shift_labels"] != -100].double()


if __name__ == "__main__":
    main()
