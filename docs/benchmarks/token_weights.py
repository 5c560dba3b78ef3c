"""What a token weight adds to the time of a step's loss.

    python docs/benchmarks/token_weights.py [VOCAB WIDTH TOKENS ROUNDS]

The fused, compiled loss of 512 tokens over 49152 entries from states of width 576, with gradients
of states and head, as for SmolLM2-135M; without a weight and with each in turn, in several rounds.
Prints as CSV the median over rounds of the ratio to the unweighted step of the same round.
"""

import statistics
import sys
import time

import torch

import kdlosses


def main() -> None:
    """Print the table."""
    vocab, width, tokens, rounds = map(int, sys.argv[1:] or ("49152", "576", "512", "7"))
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, tokens, width, generator=generator)
    heads = torch.randn(2, vocab, width, generator=generator) / width**0.5
    labels = torch.randint(0, vocab, (1, tokens), generator=generator)
    names = [None, *(ref.name for ref in kdlosses.available_weights())]
    objectives = {}
    for name in names:
        loss = kdlosses.get_loss("forward_kl_chunked", compiled=True)
        weight = None if name is None else kdlosses.get_weight(name)
        objectives[name] = kdlosses.KDObjective(loss, 0.5, weight)

    def seconds(name: str | None) -> float:
        state, head = states[:1].clone().requires_grad_(), heads[0].clone().requires_grad_()
        begin = time.perf_counter()
        student = kdlosses.Projected(state, head)
        teacher = kdlosses.Projected(states[1:], heads[1])
        objectives[name](student, teacher, labels).loss.backward()
        return time.perf_counter() - begin

    for name in names:
        seconds(name)  # compiles
    ratios: dict[str | None, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        base = seconds(None)
        for name in names:
            ratios[name].append(seconds(name) / base)
    print("weight,ratio,lowest,highest")
    for name, found in ratios.items():
        row = (statistics.median(found), min(found), max(found))
        print(",".join([name or "none", *(f"{value:.3f}" for value in row)]))


if __name__ == "__main__":
    main()
