"""What a loss loses with the teacher's k most likely tokens: mass, value and gradient.

    python docs/benchmarks/top_k_bias.py TEACHER STUDENT ROWS

TEACHER and STUDENT are folders of models that share a tokenizer, ROWS is a JSON Lines file of
prompts and answers (or Alpaca's). The value of every loss that takes top-k is compared with that of
the full distribution, and so is its gradient with respect to the student's logits.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from transformers import AutoModelForCausalLM

from kdlosses import TopK, available_losses, get_loss
from kdrun.data.collate import Collator
from kdrun.data.encoder import Encoder
from kdrun.data.rows import load_rows
from kdrun.models.tokenizers import load_tokenizer

KS = (5, 20, 64, 128)
ROWS, LENGTH = 40, 192


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("teacher", "student", "rows"):
        parser.add_argument(name)
    given = parser.parse_args()
    tokenizer = load_tokenizer(given.student)
    rows = load_rows(given.rows).rows
    examples = Encoder(tokenizer, LENGTH).chats(rows)
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        for folder in (given.teacher, given.student)
    )
    sides: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    collate = Collator(tokenizer.pad_token_id)
    for number, example in enumerate(examples):
        if number == ROWS:
            break
        batch = collate([example])
        kept = batch["shift_labels"] != -100
        with torch.no_grad():
            logits = [
                model(input_ids=batch["input_ids"]).logits[kept].double()
                for model in (teacher, student)
            ]
        sides.append((*logits, batch["shift_labels"][kept]))
    tokens = sum(len(labels) for *_, labels in sides)
    print(f"{ROWS} rows, {tokens} supervised tokens, vocabulary {sides[0][0].shape[-1]}\n")
    masses = [
        sum(float(p.softmax(-1).topk(k, -1).values.sum()) for p, *_ in sides) / tokens for k in KS
    ]
    print("| loss | " + " | ".join(f"k = {k}" for k in KS) + " |")
    print("|---|" + "---|" * len(KS))
    print("| kept mass | " + " | ".join(f"{mass:.4f}" for mass in masses) + " |")
    for entry in available_losses():
        cells = []
        try:
            for k in KS:
                cells.append(_bias(entry.name, sides, k))
        except ValueError:
            continue  # it needs all of the teacher's tokens
        print(f"| `{entry.name}` | " + " | ".join(cells) + " |")


def _bias(name: str, sides: list[tuple[torch.Tensor, ...]], k: int) -> str:
    """Return the relative bias of the value, and the relative error of the gradient."""
    loss = get_loss(name)
    full, cut, off = 0.0, 0.0, []
    for p, q, labels in sides:
        found = []
        for teacher in (p, TopK.from_logits(p, k)):
            logits = q.clone().requires_grad_()
            value = loss(logits, teacher, labels) * len(labels)
            found.append((float(value), *torch.autograd.grad(value, logits)))
        full, cut = full + found[0][0], cut + found[1][0]
        off.append(float((found[1][1] - found[0][1]).norm() / found[0][1].norm()))
    return f"{cut / full - 1:+.1%}, {statistics.mean(off):.1%}"


if __name__ == "__main__":
    main()
