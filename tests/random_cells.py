"""Cells drawn at random: any gates and states, fed in any way, of what users write.

Every expression is bounded where its arguments are, so that a few steps stay finite. Those whose
derivative PyTorch's own kernels have to fewer digits (hardsigmoid) are left out.
"""

from __future__ import annotations

import random

import torch

from flashrnn import Cell, cell

OF_ONE = """
x.abs() | -x | torch.tanh(x) | torch.sigmoid(x) | torch.exp(-x.abs()) | F.softplus(x) | F.relu(x)
F.relu6(x) | F.gelu(x) | F.silu(x) | F.mish(x) | F.leaky_relu(x, 0.1) | F.logsigmoid(x)
torch.log1p(x.abs()) | torch.log(x.abs() + 1) | torch.sqrt(x.abs() + 0.1) | x.square() | x**3
(x.abs() + 0.5) ** 0.7 | 1 / (1 + x.abs()) | torch.rsqrt(1 + x * x) | x.clamp(-1, 1) | 2 ** x.tanh()
x.clamp(min=0.25) | x.clamp(max=-0.25) | F.hardtanh(x) | F.softsign(x) | torch.sin(x) | torch.cos(x)
torch.atan(x) | torch.erf(x) | torch.floor(x) + x | torch.round(x) * 0.5 + x | torch.sign(x) * x
x.detach() * 0.5 + x | torch.expm1(x.clamp(max=2)) | torch.where(x > 0, x, 0.5 * x) | (x > 0) * x
torch.where(x > 0.5, 1.0, 0.0) + x | (x > 0).to(x.dtype) * x | x.masked_fill(x > 1, 0.25) | x * True
torch.full_like(x, 0.5) * x | torch.ones_like(x) | torch.fmod(x, 1.5) | torch.nan_to_num(x)
torch.where(x > 0, 3, 1) * x | (x > 0) * 2.0 + x | torch.where(x > 0, 1, 2) / 4 * x | x + (x > 0)
torch.logical_not(x) + x | F.threshold(x, 0.1, -0.2) | torch.where(torch.isfinite(x), x, 0.0)
"""
OF_TWO = """
x + y | x - y | x * y | x / (1 + y.abs()) | torch.maximum(x, y) | torch.minimum(x, y)
torch.where(x > y, x, y) | torch.lerp(x, y, 0.3) | torch.addcmul(x, x, y) | torch.hypot(x, y + 1)
torch.copysign(x, y) | torch.logaddexp(x, y) | x.clamp(max=y) | torch.fmax(x, y) | torch.fmin(x, y)
torch.where((x > 0) & (y > 0), x, y)
torch.where((x > 0) ^ ~(y > 0), x, y) | ((x > 0) + (y > 0)) * x | torch.where(x == y, x, y)
torch.where((x > 0) == (y > 0), x, y) | torch.where((x > 0) < (y > 0), x, y)
torch.maximum(x > 0, y > 0) * y + x | torch.logical_and(x, y) * x | torch.logical_xor(x > 0, y) * y
torch.logical_or(x.clamp(min=0), F.relu(y)) * x | torch.add(x, y, alpha=0.3)
torch.sub(x, y, alpha=2) | torch.where(x > 0, y > 0, x > 1) * x + y
((x > 0) * (y > 0)) + x | (x > 0) * y + (x <= 0) * x
torch.where(torch.where(x > 0, 1, 0) > torch.where(y > 0, 1, 0), x, y) | (x.abs() + 0.5) ** y.tanh()
torch.where((x > 0) * 2 + (y > 0) > 1, x, y) | torch.xlogy(x.abs() + 1, y.abs() + 1)
"""
EXPRESSIONS = [
    eval(f"lambda x, y: {text}", {"torch": torch, "F": torch.nn.functional})
    for texts in (OF_ONE, OF_TWO)
    for line in texts.strip().splitlines()
    for text in line.split(" | ")
]


def random_cell(rng: random.Random) -> Cell:
    """One to four states and gates; new states may be constants, old ones, gates, or alike."""
    S, G = rng.randint(1, 4), rng.randint(1, 4)
    sources = ("Wx", "R", "b")
    fed = [[x for x in sources if rng.random() < 0.7] or ["b"] for _ in range(G)]
    for needed in ("Wx", "R"):
        if not any(needed in of_gate for of_gate in fed):
            rng.choice(fed).append(needed)
    steps, count = [], S + G
    for _ in range(rng.randint(1, 8)):
        steps.append((rng.choice(EXPRESSIONS), rng.randrange(count), rng.randrange(count)))
        count += 1
    news = [
        (rng.choice(["any", "any", "tanh", "tanh", "detached", "constant"]), rng.randrange(count))
        for _ in range(S)
    ]
    number = rng.choice([0.0, -0.0, 0.5, -2.0])

    def step(
        states: tuple[torch.Tensor, ...], gates: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        values = [*states, *gates]
        for expression, x, y in steps:
            values.append(expression(values[x], values[y]))
        made = {
            "any": lambda x: x,
            "tanh": torch.tanh,
            "detached": torch.Tensor.detach,
            "constant": lambda x: torch.full_like(x, number),
        }
        return tuple(made[how](values[k]) for how, k in news)

    names = [f"g{k}" for k in range(G)]
    rng.shuffle(names)
    gates = dict(zip(names, map(tuple, fed), strict=True))
    return cell(states=["h", "c", "n", "m"][:S], gates=gates, name="random")(step)
