"""The scan over time as two Triton kernels, forward and backward, for any cell.

A program computes one head for BLOCK_B sequences and all T steps, so no program waits for another.
A tile's rows are units and its columns are sequences. A product needs 16 rows but only 8 columns,
so BLOCK_B may be 8, and twice as many programs share the work as with sequences in rows. The gates
of a step are one tile [BLOCK_G · BLOCK_D, BLOCK_B], gate by gate, and the states are one tile
[BLOCK_S · BLOCK_D, BLOCK_B]. So a step has one product, and one load and one store of each of these
tiles. The reason is that a change of a tile's thread layout costs more than anything else in a
step, since it takes shared memory and barriers. To split such a tile into gates and to join it
again moves nothing between threads, as long as a warp has 16 units of every gate.

BLOCK_D is D's next power of two, at least 16. BLOCK_G and BLOCK_S are the next powers of two of the
numbers of gates and states, at least 2, since the compiler does not always copy smaller tiles
asynchronously.

What lives where:

- registers: R, if R_IN_REGISTERS, as the product's operand; the bias; the carried states in
  float32;
- shared memory: the inputs of the next STAGES steps, copied asynchronously; h (forward) or the
  gates' gradients (backward) while they change from the thread layout of the cell's step to that of
  a product's operand;
- global memory: everything else, each element read or written once. Unless R_IN_REGISTERS, R is
  read again at every step, in slices, from the L2 cache.

The steps are ordered by the loop over t within a program, with the barriers that the compiler
inserts.

The first product of the forward scan, and the last one of the backward scan, stand outside the
loop. That keeps R in registers: with a single product, in the loop, the compiler would move the
copy of R from shared memory to registers into the loop too. In the forward scan the product of the
next step comes before the stores of this step, since the next step needs it and nothing waits for
the stores.

Padding is masked, not multiplied by zeros. A cell is not always finite where its inputs are 0, and
zero times inf is NaN. So both operands of a product, R and what it multiplies, are masked in the
summed dimension. A product also has rows for gates that R does not feed, and their results are
dropped. Columns, which are sequences, are not summed over.

In a call with options of sequences (RESETS, RAGGED, PACKED or REVERSE, together SEQUENCED) each
sequence has rows and a length of its own, and each head a direction. So addresses and masks differ
from those of a plain call.

A gate that a tensor does not feed has position -1 in that tensor's FED_... tuple. OPERAND is the
dtype of a product's operands: that of the tensors, except in Triton's interpreter, whose product
does not know bfloat16. Strides are given in units of ..._ALIGN elements, so that the compiler knows
a divisor of them whatever T and B are. Numbers below 2³¹ are passed as 32 bits; offsets that are
made of them are computed in 64.
"""

import triton
import triton.language as tl


@triton.jit
def _slots_and_units(SLOTS: tl.constexpr, BLOCK_D: tl.constexpr):
    """For each row of a tile: which of its SLOTS tiles the row belongs to, and which unit it is."""
    line = tl.arange(0, SLOTS * BLOCK_D)[:, None]
    return line // BLOCK_D, line % BLOCK_D


@triton.jit
def _unpack(tile, SLOTS: tl.constexpr, COUNT: tl.constexpr):
    """The first COUNT of the SLOTS tiles that a tile consists of, one below another."""
    tiles = (tile,)
    for _ in tl.static_range(SLOTS.bit_length() - 1):
        halves = ()
        for k in tl.static_range(len(tiles)):
            whole = tiles[k]
            pairs = tl.reshape(whole, [2, whole.shape[0] // 2, whole.shape[1]])
            upper, lower = tl.split(tl.permute(pairs, (1, 2, 0)))
            halves = halves + (upper, lower)
        tiles = halves
    wanted = ()
    for k in tl.static_range(COUNT):
        wanted = wanted + (tiles[k],)
    return wanted


@triton.jit
def _pack(tiles, SLOTS: tl.constexpr):
    """One tile of all, one below another; slots beyond them have arbitrary values."""
    for _ in tl.static_range(SLOTS - len(tiles)):
        tiles = tiles + (tiles[0],)
    for _ in tl.static_range(SLOTS.bit_length() - 1):
        joined = ()
        for k in tl.static_range(len(tiles) // 2):
            upper, lower = tiles[2 * k], tiles[2 * k + 1]
            pairs = tl.permute(tl.join(upper, lower), (2, 0, 1))
            joined = joined + (tl.reshape(pairs, [2 * upper.shape[0], upper.shape[1]]),)
        tiles = joined
    return tiles[0]


@triton.jit
def _positions(slots, FED: tl.constexpr):
    """``FED[slot]`` for every slot, -1 beyond FED's end."""
    positions = tl.full(slots.shape, -1, tl.int32)
    for k in tl.static_range(len(FED)):
        positions = tl.where(slots == k, FED[k], positions)
    return positions


@triton.jit
def _offsets(slot, row, n, unit, slot_stride, row_stride, n_stride, unit_stride):
    """Where the elements of a tile lie, in 64 bits whatever the strides are."""
    return (
        slot.to(tl.int64) * slot_stride + row * row_stride
        + n * n_stride + unit.to(tl.int64) * unit_stride
    )  # fmt: skip


@triton.jit
def _load_R(R, n, gates, produced, summed, N, D: tl.constexpr, OPERAND: tl.constexpr):
    """``R[gates, n, produced, summed]``; 0.0 where a gate is -1 or a unit beyond D."""
    offsets = ((gates.to(tl.int64) * N + n) * D + produced) * D + summed
    mask = (gates >= 0) & (produced < D) & (summed < D)
    # By `where`, not by the load's argument `other`: with that one the compiler moves the load into
    # the loop.
    return tl.where(mask, tl.load(R + offsets, mask=mask), 0.0).to(OPERAND)


@triton.jit
def _of_units(tile, unit, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The tile with 0.0 for units beyond D, whatever the cell made of them."""
    if D < BLOCK_D:
        tile = tl.where(unit < D, tile, 0.0)
    return tile


@triton.jit
def _only_fed(product, inputs, gate, FED: tl.constexpr):
    """The product, which includes the inputs; the inputs alone for gates that R does not feed."""
    for k in tl.static_range(len(FED)):
        if FED[k] < 0:
            product = tl.where(gate == k, inputs, product)
    return product


@triton.jit
def _clamped(tile, bound):
    """The tile clipped to ±bound; NaN stays."""
    tile = tl.maximum(tile, -bound, tl.PropagateNan.ALL)
    return tl.minimum(tile, bound, tl.PropagateNan.ALL)


@triton.jit
def _in_range(d_gates, CLIP: tl.constexpr):
    """Gates' gradients as a product's operand.

    If the gradient through R is clipped, infinite gradients count as the largest number of float16,
    in which finite ones may have become infinite. An infinite operand could make the product NaN,
    which no clip undoes.
    """
    if CLIP and d_gates.dtype == tl.float16:
        d_gates = _clamped(d_gates, 65504.0)
    return d_gates


@triton.jit
def _in_product_layout(tiles, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """The tiles themselves, in the thread layout in which products come out.

    It adds a product of zeros. That costs less than a change of layout later, where values that are
    computed from a loaded tile meet values that are computed from a product.
    """
    moved = ()
    for k in tl.static_range(len(tiles)):
        left = tl.zeros([tiles[k].shape[0], 16], OPERAND)
        right = tl.zeros([16, tiles[k].shape[1]], OPERAND)
        moved = moved + (tl.dot(left, right, tiles[k], input_precision=PRECISION),)
    return moved


@triton.jit
def _add_R_times_h(
    accumulator, h, stride, row_mask, dtype: tl.constexpr, R, n, gates, produced,
    N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``accumulator + R @ h``, R and h read from memory; ``h`` points at each row's first unit."""
    for first in tl.range(0, BLOCK_D, 16, num_stages=3):
        summed = first + tl.arange(0, 16)
        R_tile = _load_R(R, n, gates, produced, summed[None, :], N, D, OPERAND)
        mask = (summed < D)[:, None] & row_mask
        offsets = summed[:, None].to(tl.int64) * stride
        part = tl.load(h + offsets, mask=mask, other=0.0).to(dtype).to(OPERAND)
        accumulator = tl.dot(R_tile, part, accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit
def _sequences(place, in_batch, T, order, rows, lengths, RAGGED: tl.constexpr):
    """The sequences at places of the order: their indices, first rows and lengths."""
    if RAGGED:
        return (
            tl.load(order + place, mask=in_batch, other=0).to(tl.int64),
            tl.load(rows + place, mask=in_batch, other=0).to(tl.int64),
            tl.load(lengths + place, mask=in_batch, other=0),
        )
    else:
        return place, place * T, tl.where(in_batch, T, 0)


@triton.jit
def _time(step, lengths, backwards):
    """Where in each sequence a step is; ``backwards`` is 1 for heads that run so, else 0."""
    return (step + backwards * (lengths - 1 - 2 * step)).to(tl.int64)


@triton.jit
def _cuts(flags, step, first_row, lengths, backwards):
    """Which sequences start anew before a step. A flag cuts its row from the row before."""
    may_be = (step >= 0) & (step < lengths) & ((step > 0) | (backwards == 0))
    row = first_row + _time(step, lengths, backwards) + backwards
    return tl.load(flags + row, mask=may_be, other=0) != 0


@triton.jit
def _starts(starts, mask, offsets, row, stride_t):
    """The states that sequences start anew with, float32; zeros if ``starts`` is None."""
    if starts is None:
        return tl.zeros(mask.shape, tl.float32)
    else:
        return tl.load(starts + offsets + row * stride_t, mask=mask, other=0.0)


@triton.jit
def _h_before(states, h_starts, before_rows, rows, mask, width: tl.constexpr):
    """Pointers to h before rows: h of the row before, or what the sequence starts with."""
    of_h = tl.load(before_rows + rows, mask=mask, other=0).to(tl.int64)
    return tl.where(of_h >= 0, states + of_h * width, h_starts + (-1 - of_h) * width)


@triton.jit
def _load_states(states, offsets, mask, BLOCK_S: tl.constexpr, S: tl.constexpr):
    """A tile of states, or of their gradients, in float32; zeros where the mask does not hold."""
    tile = tl.load(states + offsets, mask=mask, other=0.0)
    return _unpack(tile.to(tl.float32), BLOCK_S, S)


@triton.jit
def _chosen(condition, tiles, others):
    """Each tile where the condition holds, else the tile of the others."""
    chosen = ()
    for k in tl.static_range(len(tiles)):
        chosen = chosen + (tl.where(condition, tiles[k], others[k]),)
    return chosen


def scan_forward(
    Wx, R, b, states_initial, states, last_states, gates,
    forward_clipval, T, B,
    wx_stride_b, wx_stride_t, wx_stride_g, wx_stride_n, wx_stride_d,
    initial_stride_s, initial_stride_b, initial_stride_n, initial_stride_d,
    sequence_order, sequence_rows, sequence_lengths, runs_backwards, reset_flags, reset_states,
    before_rows, h_starts, rows_of_all,
    reset_stride_s, reset_stride_b, reset_stride_t, reset_stride_n, reset_stride_d,
    N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr, S: tl.constexpr,
    FED_WX: tl.constexpr, FED_R: tl.constexpr, FED_B: tl.constexpr,
    WX_ALIGN: tl.constexpr, WX_WIDE: tl.constexpr, STORE_GATES: tl.constexpr,
    R_IN_REGISTERS: tl.constexpr, STAGES: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, step: tl.constexpr,
    RESETS: tl.constexpr, RAGGED: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    STORED: tl.constexpr,
):  # fmt: skip
    """T steps of one head for BLOCK_B sequences.

    Wx [B, T, Gw, N, D] and states_initial [S, B, 1, N, D] have any strides, R [Gr, N, D, D] and
    b [Gb, N, D] are contiguous; writes states [S, B, T, N, D], last_states [S, B, 1, N, D] and,
    if STORE_GATES, the pre-activations gates [B, T, G, N, D], all contiguous.
    WX_WIDE: offsets within one step of a sequence of Wx may need more than 32 bits.

    RESETS, RAGGED, PACKED, REVERSE: which options of sequences the call has; what they read is None
    without them. Of a sequence past its end nothing is loaded or stored, and its states stay.
    STORED: how many states are stored.
    """
    G: tl.constexpr = len(FED_WX)
    width: tl.constexpr = N * D
    dtype = Wx.dtype.element_ty
    length = tl.cast(T, tl.int64)
    wx_stride_t = tl.cast(wx_stride_t, tl.int64) * WX_ALIGN
    n = (tl.program_id(0) % N).to(tl.int64)
    row = (tl.program_id(0) // N).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]
    gate, gate_unit = _slots_and_units(BLOCK_G, BLOCK_D)
    state, state_unit = _slots_and_units(BLOCK_S, BLOCK_D)
    gates_mask = (gate < G) & (gate_unit < D) & (row < B)
    states_mask = (state < S) & (state_unit < D) & (row < B)
    stored_mask = states_mask & (state < STORED)
    SEQUENCED: tl.constexpr = RESETS or RAGGED or REVERSE
    index, steps = row, T
    if SEQUENCED:
        index, first_row, lengths = _sequences(
            row, row < B, length, sequence_order, sequence_rows, sequence_lengths, RAGGED
        )
        backwards = tl.load(runs_backwards + n) if REVERSE else 0
        forwards = 1 - 2 * backwards
        if RAGGED:
            # The longest comes first.
            steps = tl.load(sequence_lengths + (tl.program_id(0) // N) * BLOCK_B)
        start = _time(0, lengths, backwards)

    unit = tl.arange(0, BLOCK_D)[:, None]

    initial_offsets = _offsets(
        state, index, n, state_unit,
        initial_stride_s, initial_stride_b, initial_stride_n, initial_stride_d
    )  # fmt: skip
    carried = _load_states(states_initial, initial_offsets, states_mask, BLOCK_S, S)
    if RESETS:
        reset_offsets = _offsets(
            state, index, n, state_unit,
            reset_stride_s, reset_stride_b, reset_stride_n, reset_stride_d
        )  # fmt: skip
        if PACKED:
            reset_offsets += first_row * reset_stride_t
        cut = _cuts(reset_flags, 0, first_row, lengths, backwards)
        anew = _starts(reset_states, states_mask & cut, reset_offsets, start, reset_stride_t)
        carried = _chosen(cut, _unpack(anew, BLOCK_S, S), carried)
    fed_b, fed_r, fed_wx = (
        _positions(gate, FED_B),
        _positions(gate, FED_R),
        _positions(gate, FED_WX),
    )
    bias = tl.load(
        b + (fed_b.to(tl.int64) * N + n) * D + gate_unit,
        mask=(fed_b >= 0) & (gate_unit < D),
        other=0.0,
    ).to(tl.float32)
    if R_IN_REGISTERS:
        R_tile = _load_R(R, n, fed_r, gate_unit, tl.arange(0, BLOCK_D)[None, :], N, D, OPERAND)

    wx_mask = gates_mask & (fed_wx >= 0)
    # In 64 bits only where they must be: with those, the assembler makes the products wait for the
    # stores.
    if SEQUENCED or WX_WIDE:
        wx_offsets = _offsets(
            fed_wx, index, n, gate_unit,
            tl.cast(wx_stride_g, tl.int64) * WX_ALIGN,
            0 if PACKED else tl.cast(wx_stride_b, tl.int64) * WX_ALIGN,
            tl.cast(wx_stride_n, tl.int64) * WX_ALIGN, wx_stride_d
        )  # fmt: skip
    else:
        wx_offsets = (
            row * (wx_stride_b * WX_ALIGN) + n * (wx_stride_n * WX_ALIGN)
            + fed_wx * (wx_stride_g * WX_ALIGN) + gate_unit * wx_stride_d
        )  # fmt: skip
    if SEQUENCED:
        wx_offsets += (start + (first_row if PACKED else 0)) * wx_stride_t
        wx_stride_t = wx_stride_t * forwards
        every = tl.cast(rows_of_all, tl.int64)
        states_offsets = _offsets(
            state, first_row + start, n, state_unit, every * width, width, D, 1
        )  # fmt: skip
        gates_offsets = _offsets(gate, first_row + start, n, gate_unit, width, G * width, D, 1)
        states_stride_t, gates_stride_t = forwards * width, forwards * (G * width)
    else:
        states_offsets = _offsets(
            state, row, n, state_unit, length * width * B, length * width, D, 1
        )  # fmt: skip
        gates_offsets = _offsets(gate, row, n, gate_unit, width, length * (G * width), D, 1)
        states_stride_t, gates_stride_t = width, G * width

    # The product of the first step; each step in the loop computes that of the next step.
    any_step = lengths > 0 if SEQUENCED else T > 0
    inputs = tl.load(Wx + wx_offsets, mask=wx_mask & any_step, other=0.0)
    inputs = inputs.to(tl.float32) + bias
    if R_IN_REGISTERS:
        # h is rounded before it multiplies R: the same numbers as the stored h.
        h = _of_units(carried[0], unit, D, BLOCK_D).to(dtype).to(OPERAND)
        preactivations = tl.dot(R_tile, h, inputs, input_precision=PRECISION)
    else:
        if SEQUENCED:
            first = backwards * rows_of_all + first_row + start
            h_initial = _h_before(states, h_starts, before_rows, first, any_step, width) + n * D
            h_stride, h_mask = 1, any_step
        else:
            h_initial = states_initial + row * initial_stride_b + n * initial_stride_n
            h_stride, h_mask = initial_stride_d, row < B
        preactivations = _add_R_times_h(
            inputs, h_initial, h_stride, h_mask, dtype,
            R, n, fed_r, gate_unit, N, D, BLOCK_D, OPERAND, PRECISION
        )  # fmt: skip
    preactivations = _only_fed(preactivations, inputs, gate, FED_R)
    for t in tl.range(0, steps, num_stages=STAGES):
        wx_offsets += wx_stride_t
        if SEQUENCED:
            has, has_next = t < lengths, t + 1 < lengths
        else:
            has, has_next = True, t + 1 < T
        inputs = tl.load(Wx + wx_offsets, mask=wx_mask & has_next, other=0.0)
        if RESETS:
            cut = _cuts(reset_flags, t + 1, first_row, lengths, backwards)
            time = _time(t + 1, lengths, backwards)
            anew = _starts(reset_states, states_mask & cut, reset_offsets, time, reset_stride_t)
        before = carried
        carried = step(carried, _unpack(preactivations, BLOCK_G, G), forward_clipval)
        if RAGGED:
            carried = _chosen(has, carried, before)
        after = carried
        if RESETS:
            carried = _chosen(cut, _unpack(anew, BLOCK_S, S), carried)
        # After the cell's step, which does not need them.
        inputs = inputs.to(tl.float32) + bias
        if R_IN_REGISTERS:
            h = _of_units(carried[0], unit, D, BLOCK_D).to(dtype).to(OPERAND)
            following = tl.dot(R_tile, h, inputs, input_precision=PRECISION)
        tl.store(states + states_offsets, _pack(after, BLOCK_S).to(dtype), mask=stored_mask & has)
        if not R_IN_REGISTERS:
            tl.debug_barrier()
            if SEQUENCED:
                rows_next = backwards * rows_of_all + first_row + _time(t + 1, lengths, backwards)
                stored_h = _h_before(states, h_starts, before_rows, rows_next, has_next, width)
                stored_h, stored_h_mask = stored_h + n * D, has_next
            else:
                stored_h, stored_h_mask = states + (row * length + t) * width + n * D, row < B
            following = _add_R_times_h(
                inputs, stored_h, 1, stored_h_mask, dtype,
                R, n, fed_r, gate_unit, N, D, BLOCK_D, OPERAND, PRECISION
            )  # fmt: skip
        if STORE_GATES:
            tl.store(gates + gates_offsets, preactivations.to(dtype), mask=gates_mask & has)
        states_offsets += states_stride_t
        gates_offsets += gates_stride_t
        preactivations = _only_fed(following, inputs, gate, FED_R)
    last_offsets = _offsets(state, index, n, state_unit, tl.cast(B, tl.int64) * width, width, D, 1)
    tl.store(last_states + last_offsets, _pack(carried, BLOCK_S), mask=states_mask)


@triton.jit
def _through_R(
    came, operand, R_tile, d_gates, row_mask, R, n, unit, clipval,
    N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, FED_R: tl.constexpr,
    CLIP: tl.constexpr, R_IN_REGISTERS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h's gradient that comes from the next step through R; 0.0 where ``came`` is not true.

    ``Rᵀ @ d_gates``: of ``R_tile`` and ``operand`` if R_IN_REGISTERS, else of memory, where
    ``d_gates`` points at the first element of each row.
    """
    if R_IN_REGISTERS:
        d_h = tl.dot(R_tile, operand, input_precision=PRECISION)
    else:
        d_h = tl.zeros([BLOCK_D, row_mask.shape[1]], tl.float32)
        for first in tl.range(0, len(FED_R) * BLOCK_D, 16, num_stages=3):
            summed = first + tl.arange(0, 16)
            gate, produced = summed // BLOCK_D, summed % BLOCK_D
            fed = _positions(gate, FED_R)
            R_slice = _load_R(R, n, fed[None, :], produced[None, :], unit, N, D, OPERAND)
            offsets = (gate.to(tl.int64) * (N * D) + produced)[:, None]
            mask = ((fed >= 0) & (produced < D))[:, None] & row_mask
            part = _in_range(tl.load(d_gates + offsets, mask=mask, other=0.0), CLIP).to(OPERAND)
            d_h = tl.dot(R_slice, part, d_h, input_precision=PRECISION)
    if CLIP:
        d_h = _clamped(d_h, clipval)
    # Chosen, not multiplied: zeros times an infinite R are NaN.
    return tl.where(came, d_h, 0.0)


@triton.jit
def _left_behind(d_carried, cut, d_starts, offsets, mask, row_offset, BLOCK_S: tl.constexpr):
    """The carried gradients, 0.0 where a step starts anew; there they are added to ``d_starts``."""
    if d_starts is not None:
        # Atomic because a plain load could be moved ahead of the store of an earlier step. Only one
        # thread adds to each element, so the order of a sum is fixed.
        left = _pack(d_carried, BLOCK_S)
        tl.atomic_add(d_starts + offsets + row_offset, left, mask=mask & cut, sem="relaxed")
    zeros = ()
    for s in tl.static_range(len(d_carried)):
        zeros = zeros + (tl.where(cut, 0.0, d_carried[s]),)
    return zeros


def scan_backward(
    R, states_initial, states, gates, d_states, d_last_states, d_gates, d_states_initial,
    clipval, forward_clipval, T, B,
    initial_stride_s, initial_stride_b, initial_stride_n, initial_stride_d,
    d_states_stride_s, d_states_stride_b, d_states_stride_t, d_states_stride_n, d_states_stride_d,
    d_last_stride_s, d_last_stride_b, d_last_stride_n, d_last_stride_d,
    sequence_order, sequence_rows, sequence_lengths, runs_backwards, reset_flags, reset_states,
    d_reset_states, rows_of_all,
    reset_stride_s, reset_stride_b, reset_stride_t, reset_stride_n, reset_stride_d,
    d_reset_stride_s, d_reset_stride_b, d_reset_stride_t,
    N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr, S: tl.constexpr,
    FED_R: tl.constexpr, D_STATES_ALIGN: tl.constexpr,
    CUT: tl.constexpr, CLIP: tl.constexpr, GIVEN: tl.constexpr,
    R_IN_REGISTERS: tl.constexpr, STAGES: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, derivative: tl.constexpr,
    RESETS: tl.constexpr, RAGGED: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The scan backwards, from the residuals states and gates that the forward one wrote.

    Writes d_gates [B, T, G, N, D], the gradients of the pre-activations, and d_states_initial
    [S, B, 1, N, D], both contiguous. The gradients of R, b and Wx follow from d_gates outside.
    CUT: no gradient through R. CLIP: that gradient is clipped to ±clipval at every step.
    d_states has the gradients of the first GIVEN states; it, and d_last_states, may be None.

    RESETS, RAGGED, PACKED, REVERSE: as in the forward scan. The gradients of a sequence's last
    states wait for its last step; those of d_reset_states [S, B, T, N, D] are added to it.
    """
    G: tl.constexpr = len(FED_R)
    width: tl.constexpr = N * D
    dtype = R.dtype.element_ty
    length = tl.cast(T, tl.int64)
    d_states_stride_t = tl.cast(d_states_stride_t, tl.int64) * D_STATES_ALIGN
    n = (tl.program_id(0) % N).to(tl.int64)
    row = (tl.program_id(0) // N).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]
    unit = tl.arange(0, BLOCK_D)[:, None]
    gate, gate_unit = _slots_and_units(BLOCK_G, BLOCK_D)
    state, state_unit = _slots_and_units(BLOCK_S, BLOCK_D)
    gates_mask = (gate < G) & (gate_unit < D) & (row < B)
    states_mask = (state < S) & (state_unit < D) & (row < B)
    given_mask = (state < GIVEN) & (state_unit < D) & (row < B)
    SEQUENCED: tl.constexpr = RESETS or RAGGED or REVERSE
    index, steps = row, T
    if SEQUENCED:
        index, first_row, lengths = _sequences(
            row, row < B, length, sequence_order, sequence_rows, sequence_lengths, RAGGED
        )
        backwards = tl.load(runs_backwards + n) if REVERSE else 0
        forwards = 1 - 2 * backwards
        if RAGGED:
            # The longest comes first.
            steps = tl.load(sequence_lengths + (tl.program_id(0) // N) * BLOCK_B)
        end = _time(steps - 1, lengths, backwards)
    if RESETS:
        reset_offsets = _offsets(
            state, index, n, state_unit,
            reset_stride_s, reset_stride_b, reset_stride_n, reset_stride_d
        )  # fmt: skip
        d_reset_offsets = _offsets(
            state, index, n, state_unit, d_reset_stride_s, d_reset_stride_b, D, 1
        )  # fmt: skip
        if PACKED:
            reset_offsets += first_row * reset_stride_t
            d_reset_offsets += first_row * d_reset_stride_t
        # Whether the step computed last starts anew.
        cut = row < 0

    initial_offsets = _offsets(
        state, index, n, state_unit,
        initial_stride_s, initial_stride_b, initial_stride_n, initial_stride_d
    )  # fmt: skip
    initial = _load_states(states_initial, initial_offsets, states_mask, BLOCK_S, S)
    initial = _in_product_layout(initial, OPERAND, PRECISION)
    if d_last_states is None:
        d_carried = _unpack(tl.zeros([BLOCK_S * BLOCK_D, BLOCK_B], tl.float32), BLOCK_S, S)
    else:
        d_last_offsets = _offsets(
            state, index, n, state_unit,
            d_last_stride_s, d_last_stride_b, d_last_stride_n, d_last_stride_d
        )  # fmt: skip
        d_carried = _load_states(d_last_states, d_last_offsets, states_mask, BLOCK_S, S)
    if R_IN_REGISTERS:
        # R transposed: columns are gates' units, as the rows of d_gates are.
        summed = tl.arange(0, BLOCK_G * BLOCK_D)[None, :]
        fed = _positions(summed // BLOCK_D, FED_R)
        R_tile = _load_R(R, n, fed, summed % BLOCK_D, unit, N, D, OPERAND)
    else:
        R_tile = None

    last = length - 1
    # `states` is read one step earlier than the rest: the states before the step.
    if SEQUENCED:
        every = tl.cast(rows_of_all, tl.int64)
        states_stride_t, gates_stride_t = forwards * width, forwards * (G * width)
        d_states_row = first_row + end if PACKED else end
        states_offsets = (
            _offsets(state, first_row + end, n, state_unit, every * width, width, D, 1)
            - states_stride_t
        )
        gates_offsets = _offsets(gate, first_row + end, n, gate_unit, width, G * width, D, 1)
        d_states_offsets = d_states_row * d_states_stride_t + _offsets(
            state, index, n, state_unit,
            tl.cast(d_states_stride_s, tl.int64) * D_STATES_ALIGN,
            0 if PACKED else tl.cast(d_states_stride_b, tl.int64) * D_STATES_ALIGN,
            tl.cast(d_states_stride_n, tl.int64) * D_STATES_ALIGN, d_states_stride_d
        )  # fmt: skip
        d_states_stride_t = d_states_stride_t * forwards
    else:
        states_stride_t, gates_stride_t = width, G * width
        states_offsets = (last - 1) * width + _offsets(
            state, row, n, state_unit, length * width * B, length * width, D, 1
        )
        gates_offsets = last * (G * width) + _offsets(
            gate, row, n, gate_unit, width, length * (G * width), D, 1
        )
        d_states_offsets = last * d_states_stride_t + _offsets(
            state, row, n, state_unit,
            tl.cast(d_states_stride_s, tl.int64) * D_STATES_ALIGN,
            tl.cast(d_states_stride_b, tl.int64) * D_STATES_ALIGN,
            tl.cast(d_states_stride_n, tl.int64) * D_STATES_ALIGN, d_states_stride_d
        )  # fmt: skip

    # Every step begins with the product that gives h's gradient from the gates' gradients of the
    # step after it. The last step has no step after it; the initial h's gradient takes a product
    # behind the loop.
    operand = tl.zeros([BLOCK_G * BLOCK_D, BLOCK_B], OPERAND)
    for i in tl.range(0, steps, num_stages=STAGES):
        if SEQUENCED:
            now = steps - 1 - i
            has, has_before = now < lengths, now > 0
        else:
            has, has_before = True, i + 1 < T
        mask = states_mask & has & has_before
        before = tl.load(states + states_offsets, mask=mask, other=0.0)
        preactivations = tl.load(gates + gates_offsets, mask=gates_mask & has, other=0.0)
        if GIVEN > 0:
            d_given = tl.load(d_states + d_states_offsets, mask=given_mask & has, other=0.0)
        came = now + 1 < lengths if SEQUENCED else i > 0
        before = before.to(tl.float32)
        is_first = i + 1 == steps
        if RESETS:
            cut_now = _cuts(reset_flags, now, first_row, lengths, backwards)
            time = _time(now, lengths, backwards)
            anew = _starts(reset_states, states_mask & cut_now, reset_offsets, time, reset_stride_t)
            before = tl.where(cut_now, anew, before)
            is_first = is_first & (cut_now == 0)
        before = _in_product_layout(_unpack(before, BLOCK_S, S), OPERAND, PRECISION)
        preactivations = _in_product_layout(
            _unpack(preactivations.to(tl.float32), BLOCK_G, G), OPERAND, PRECISION
        )
        if GIVEN > 0:
            d_given = _unpack(d_given.to(tl.float32), BLOCK_S, S)

        if not CUT:
            if not R_IN_REGISTERS:
                tl.debug_barrier()
            if SEQUENCED:
                rows_after, row_mask = first_row + _time(now + 1, lengths, backwards), came
            else:
                rows_after, row_mask = row * length + last - i + 1, tl.where(came, row < B, False)
            d_h = _through_R(
                came, operand, R_tile, d_gates + rows_after * (G * width) + n * D, row_mask,
                R, n, unit, clipval, N, D, BLOCK_D, FED_R, CLIP, R_IN_REGISTERS, OPERAND, PRECISION
            )  # fmt: skip
            d_carried = (d_carried[0] + d_h,) + d_carried[1:]
        if RESETS:
            d_carried = _left_behind(
                d_carried, cut, d_reset_states, d_reset_offsets, states_mask,
                _time(now + 1, lengths, backwards) * d_reset_stride_t, BLOCK_S
            )  # fmt: skip
            cut = cut_now
        values = ()
        gradients = ()
        for s in tl.static_range(S):
            values = values + (tl.where(is_first, initial[s], before[s]),)
            d_after = d_carried[s]
            if s < GIVEN:
                d_after += d_given[s]
            gradients = gradients + (d_after,)
        d_inputs = derivative(values, preactivations, gradients, forward_clipval)

        d_carried = _chosen(has, d_inputs[:S], d_carried) if RAGGED else d_inputs[:S]
        d_preactivations = ()
        fed_by_R = ()
        for k in tl.static_range(G):
            d_gate = _of_units(d_inputs[S + k], unit, D, BLOCK_D).to(dtype)
            if RAGGED:
                d_gate = tl.where(has, d_gate, 0.0).to(dtype)
            d_preactivations = d_preactivations + (d_gate,)
            fed_by_R = fed_by_R + (
                (d_gate if FED_R[k] >= 0 else tl.zeros([BLOCK_D, BLOCK_B], dtype)),
            )
        for _ in tl.static_range(BLOCK_G - G):
            # Zeros, not arbitrary values: in the product these slots are multiplied by R's zeros.
            d_preactivations = d_preactivations + (tl.zeros([BLOCK_D, BLOCK_B], dtype),)
            fed_by_R = fed_by_R + (tl.zeros([BLOCK_D, BLOCK_B], dtype),)
        operand = _in_range(_pack(fed_by_R, BLOCK_G), CLIP).to(OPERAND)
        tl.store(d_gates + gates_offsets, _pack(d_preactivations, BLOCK_G), mask=gates_mask & has)
        states_offsets -= states_stride_t
        gates_offsets -= gates_stride_t
        d_states_offsets -= d_states_stride_t
    came = lengths > 0 if SEQUENCED else T > 0
    if not CUT:
        if not R_IN_REGISTERS:
            tl.debug_barrier()
        first_rows = first_row + _time(0, lengths, backwards) if SEQUENCED else row * length
        d_h = _through_R(
            came, operand, R_tile, d_gates + first_rows * (G * width) + n * D,
            tl.where(came, row < B, False),
            R, n, unit, clipval, N, D, BLOCK_D, FED_R, CLIP, R_IN_REGISTERS, OPERAND, PRECISION
        )  # fmt: skip
        d_carried = (d_carried[0] + d_h,) + d_carried[1:]
    if RESETS:
        d_carried = _left_behind(
            d_carried, cut, d_reset_states, d_reset_offsets, states_mask,
            _time(0, lengths, backwards) * d_reset_stride_t, BLOCK_S
        )  # fmt: skip
    d_initial_offsets = _offsets(
        state, index, n, state_unit, tl.cast(B, tl.int64) * width, width, D, 1
    )
    tl.store(d_states_initial + d_initial_offsets, _pack(d_carried, BLOCK_S), mask=states_mask)


# Arguments that Triton must not compile kernels of their own for (those that are 1, or divisible by
# 16). The innermost strides are not among them: where one is 1, loads are vectors.
_ONLY_AT_RUN_TIME = [
    *("clipval", "forward_clipval", "T", "B"),
    *("wx_stride_b", "wx_stride_t", "wx_stride_g", "wx_stride_n"),
    *("initial_stride_s", "initial_stride_b", "initial_stride_n"),
    *("d_states_stride_s", "d_states_stride_b", "d_states_stride_t", "d_states_stride_n"),
    *("d_last_stride_s", "d_last_stride_b", "d_last_stride_n"),
    *("rows_of_all", "reset_stride_s", "reset_stride_b", "reset_stride_t", "reset_stride_n"),
    *("d_reset_stride_s", "d_reset_stride_b", "d_reset_stride_t"),
]


def new_kernels():
    """``scan_forward`` and ``scan_backward`` as kernels of their own.

    They hold what was compiled for them. It is unloaded with them.
    """
    forward = triton.jit(scan_forward, do_not_specialize=_ONLY_AT_RUN_TIME)
    return forward, triton.jit(scan_backward, do_not_specialize=_ONLY_AT_RUN_TIME)
