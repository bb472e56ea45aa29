"""State tracking tasks: a stream of tokens drives a finite automaton, and the network follows.

A linear recurrence with a diagonal matrix and a Transformer of fixed depth cannot do this for
streams of any length; a network whose next state depends on its last one non-linearly can
(Merrill et al., 2024, "The Illusion of State in State-Space Models").
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

MODULUS = 5
ELEMENTS = 5


@dataclass(frozen=True, eq=False)
class Automaton:
    """A finite automaton.

    Attributes:
        name: as in ``--task``.
        title: what it is, in a line.
        table: ``[states, tokens]``, the next state, int64.
        start: the state before the first token.
        tokens: how each token is written.
    """

    name: str
    title: str
    table: Tensor
    start: int
    tokens: tuple[str, ...]

    def run(self, tokens: Tensor) -> Tensor:
        """The state after every token.

        Args:
            tokens: ``[B, T]``, int64.

        Returns:
            ``[B, T]``, int64.
        """
        state = torch.full_like(tokens[:, 0], self.start)
        visited = []
        for token in tokens.unbind(1):
            state = self.table[state, token]
            visited.append(state)
        return torch.stack(visited, dim=1)

    def sample(self, B: int, T: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """B streams of T tokens, each token equally likely, and the state after every token.

        Returns:
            tokens and states, both ``[B, T]``, int64, on the CPU.
        """
        tokens = torch.randint(len(self.tokens), (B, T), generator=generator)
        return tokens, self.run(tokens)


def parity() -> Automaton:
    """Whether the number of ones so far is odd."""
    table = torch.tensor([[0, 1], [1, 0]])
    return Automaton("parity", "parity of a stream of bits", table, 0, ("0", "1"))


def modular_arithmetic() -> Automaton:
    """The running value of ``0 op digit op digit ...`` modulo 5, worked out from left to right."""
    tokens, columns = [], []
    values = torch.arange(MODULUS)
    for digit in range(MODULUS):
        for sign, result in (("+", values + digit), ("-", values - digit), ("*", values * digit)):
            tokens.append(f"{sign}{digit}")
            columns.append(result % MODULUS)
    title = f"arithmetic modulo {MODULUS} from left to right"
    return Automaton("mod", title, torch.stack(columns, dim=1), 0, tuple(tokens))


def symmetric_group() -> Automaton:
    """The product of a stream of swaps of two out of five elements: the word problem of S5.

    The tokens are the ten swaps, which generate all of S5, and the identity, without which the
    number of tokens would betray half of the state. State k is the k-th permutation in
    lexicographic order; a token p turns the state s into ``i -> p[s[i]]``.
    """
    elements = tuple(permutations(range(ELEMENTS)))
    index = {element: k for k, element in enumerate(elements)}
    start = tuple(range(ELEMENTS))
    tokens = [p for p in elements if sum(a != b for a, b in zip(p, start, strict=True)) <= 2]
    table = torch.tensor(
        [[index[tuple(token[i] for i in state)] for token in tokens] for state in elements]
    )
    names = tuple("".join(map(str, token)) for token in tokens)
    return Automaton("s5", "word problem of S5, as a stream of swaps", table, index[start], names)


AUTOMATA = {"parity": parity, "mod": modular_arithmetic, "s5": symmetric_group}
