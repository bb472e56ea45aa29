"""``Recurrent``: what torch.nn does not have, with its contract."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

import flashrnn.nn as ours
from tests.nn.against import assert_same, every_kind, own, random, run


class TestRecurrent:
    """What torch.nn does not have, in the same clothes."""

    @pytest.mark.parametrize("function", ["slstm", own])
    def test_shapes_of_any_cell(self, function):
        layer = ours.Recurrent(
            function, 3, 8, 2, bidirectional=True, heads=2, batch_first=True, dtype=torch.float64
        )
        names = layer.cell.states
        x = random(4, 5, 3)
        output, last = layer(x)
        assert output.shape == (4, 5, 16) and len(last) == len(names)
        assert all(state.shape == (4, 4, 8) for state in last)
        _, gradients = run(layer, x, last)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        assert_same(copy.deepcopy(layer)(x), (output, last), 0)

    @every_kind
    def test_heads_are_blocks_of_torchs_matrix(self, kind):
        N, D = 3, 2
        mine = getattr(ours, kind)(4, N * D, 2, bidirectional=True, heads=N, dtype=torch.float64)
        theirs = getattr(nn, kind)(4, N * D, 2, bidirectional=True, dtype=torch.float64)
        weights = mine.state_dict()
        for name, weight in weights.items():
            if name.startswith("weight_hh"):
                blocks = weight.view(-1, N, D, D)
                dense = [torch.block_diag(*gate) for gate in blocks]
                weights[name] = torch.cat(dense)
        theirs.load_state_dict(weights)
        x = random(5, 3, 4)
        assert_same(mine(x), theirs(x))

    def test_sequences_alone_and_packed_with_another_cell(self):
        layer = ours.Recurrent("slstm", 3, 4, 2, bidirectional=True, dtype=torch.float64)
        sequences = [random(n, 3) for n in (2, 5, 1)]
        packed, last = layer(pack_sequence(sequences, enforce_sorted=False))
        padded, lengths = pad_packed_sequence(packed)
        for b, sequence in enumerate(sequences):
            output, alone = layer(sequence)
            assert_same(padded[: lengths[b], b], output)
            assert_same([state[:, b] for state in last], alone)
