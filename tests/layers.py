"""Random layers, and what they are made of."""

import torch
from torch.nn.functional import linear

from flashrnn import flashrnn
from flashrnn.cells import resolve
from tests.problems import random_inputs, random_weights

NAMES = ("x", "W", "R", "b", "states")


def layer_inputs(function, B, T, features, N, D, dtype=torch.float32, seed=0, device="cpu"):
    """Leaves x, W, R, b and states."""
    others = random_inputs(function, B, T, N, D, dtype, device, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    Gw = len(resolve(function).fed_by("Wx"))
    x = torch.randn(B, T, features, generator=generator)
    W = torch.randn(Gw, N, D, features, generator=generator) / max(features, 1) ** 0.5
    leaves = [x.to(device, dtype), W.to(device, dtype)]
    return [leaf.requires_grad_() for leaf in leaves] + [others.R, others.b, others.states]


def two_nodes(x, W, R, b, states, function, backend, **options):
    """What a layer is: PyTorch's own product, and flashrnn()."""
    B, T, _ = x.shape
    Wx = linear(x, W.flatten(0, 2)).view(B, T, *W.shape[:3])
    return flashrnn(Wx, R, b, states, function, backend, **options)


def results(call, inputs, asked, *arguments, **options):
    return and_gradients(call(*inputs, *arguments, **options), inputs, asked)


def and_gradients(outputs, inputs, asked=NAMES):
    """Those that are asked for, of a random weighted sum of the outputs."""
    asked = [x for x, name in zip(inputs, NAMES, strict=True) if name in asked]
    weights = random_weights(outputs, seed=1)
    return [*outputs, *torch.autograd.grad(outputs, asked, weights, allow_unused=True)]
