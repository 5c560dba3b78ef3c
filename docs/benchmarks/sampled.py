"""Spread of losses estimated from a sampled teacher, relative to the full value.

    python docs/benchmarks/sampled.py

One row, V = 1000, logits of standard deviation 2 on both sides, 20,000 repetitions. Prints as CSV
the standard deviation and the mean of the estimates, both divided by the full value.
"""

import torch

import kdlosses

REPETITIONS, BLOCK = 20_000, 1_000

generator = torch.Generator().manual_seed(0)
student, teacher = 2 * torch.randn(2, 1, 1000, generator=generator)
label = torch.tensor([0])
print("loss,draws,standard_deviation,mean")
for name in ("forward_kl", "generalized_jsd", "total_variation", "reverse_kl"):
    loss = kdlosses.get_loss(name)
    full = loss(student, teacher, label)
    for draws in (10, 50, 200):
        found = []
        for _ in range(REPETITIONS // BLOCK):
            drawn = kdlosses.Sampled.from_logits(
                teacher.expand(BLOCK, -1), draws, generator=generator
            )
            found.append(
                loss(student.expand(BLOCK, -1), drawn, label.expand(BLOCK), reduction="none")
            )
        values = torch.cat(found) / full
        print(f"{name},{draws},{values.std():.2f},{values.mean():.3f}")
