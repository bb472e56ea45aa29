"""The scan over time as two Triton kernels, forward and backward, for any cell.

One program owns one head and one tile of BB sequences for all T steps, so no program waits for
another. What lives where:

- registers: the head's blocks of R (the compiler hoists them, in the layout of the product's
  operand), the bias, the carried states in float32, and the inputs of the step to come;
- shared memory: h (forward) or the gates' gradients (backward) on their way from the layout in
  which the cell leaves them to the one in which the product reads them;
- global memory: everything else, each element read or written once.

Within a step: the loads for the next step are issued; the product runs on h of the step before;
the cell; the stores. Only product and cell depend on the step before.

Shapes are padded to tiles by masks alone: DD is D's next power of two, at least 16. A gate that
a tensor does not feed has position -1 in that tensor's FED_... tuple. OPERAND is the dtype in
which the product gets its operands: the tensors' own, but for Triton's interpreter, whose product
does not know bfloat16.
"""

import triton
import triton.language as tl


@triton.jit
def _load_each(pointer, offsets, stride, mask, FED: tl.constexpr):
    """A float32 tile for each fed gate, 0.0 for the others."""
    tiles = ()
    for k in tl.static_range(len(FED)):
        if FED[k] >= 0:
            tile = tl.load(pointer + offsets + FED[k] * stride, mask=mask, other=0.0)
            tiles = tiles + (tile,)
        else:
            tiles = tiles + (0.0,)
    return tiles


@triton.jit
def _store_each(pointer, offsets, stride, mask, tiles):
    for k in tl.static_range(len(tiles)):
        tl.store(pointer + offsets + k * stride, tiles[k].to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def scan_forward(
    Wx,
    R,
    b,
    states_initial,
    states,
    last_states,
    gates,
    T,
    B,
    N,
    wx_stride_b,
    wx_stride_t,
    wx_stride_g,
    wx_stride_n,
    wx_stride_d,
    initial_stride_s,
    initial_stride_b,
    initial_stride_n,
    initial_stride_d,
    states_stride_s,
    D: tl.constexpr,
    DD: tl.constexpr,
    BB: tl.constexpr,
    S: tl.constexpr,
    FED_WX: tl.constexpr,
    FED_R: tl.constexpr,
    FED_B: tl.constexpr,
    STORE_GATES: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    step: tl.constexpr,
):
    """T steps of one head for BB sequences.

    Wx [B, T, Gw, N, D] and states_initial [S, B, 1, N, D] have any strides, R [Gr, N, D, D] and
    b [Gb, N, D] are contiguous; writes states [S, B, T, N, D], last_states [S, B, 1, N, D] and,
    if STORE_GATES, the pre-activations gates [B, T, G, N, D], all contiguous.
    """
    G: tl.constexpr = len(FED_WX)
    dtype = Wx.dtype.element_ty
    n = (tl.program_id(0) % N).to(tl.int64)
    rows = (tl.program_id(0) // N).to(tl.int64) * BB + tl.arange(0, BB)[:, None]
    columns = tl.arange(0, DD)[None, :]
    unit = columns < D
    mask = (rows < B) & unit

    # R's blocks transposed, [summed over, D], so that h @ block is R @ h for every row.
    summed = tl.arange(0, DD)[:, None]
    blocks = ()
    biases = ()
    for k in tl.static_range(G):
        if FED_R[k] >= 0:
            block = tl.load(
                R + ((FED_R[k] * N + n) * D + columns) * D + summed,
                mask=(summed < D) & unit,
                other=0.0,
            )
            blocks = blocks + (block.to(OPERAND),)
        else:
            blocks = blocks + (0.0,)
        if FED_B[k] >= 0:
            bias = tl.load(b + (FED_B[k] * N + n) * D + columns, mask=unit, other=0.0)
            biases = biases + (bias.to(tl.float32),)
        else:
            biases = biases + (0.0,)

    carried = ()
    for s in tl.static_range(S):
        state = tl.load(
            states_initial + s * initial_stride_s + rows * initial_stride_b
            + n * initial_stride_n + columns * initial_stride_d,
            mask=mask,
            other=0.0,
        )  # fmt: skip
        carried = carried + (state.to(tl.float32),)

    wx_offsets = rows * wx_stride_b + n * wx_stride_n + columns * wx_stride_d
    # states: [S, B, T, N, D]; gates: [B, T, G, N, D].
    width = N * D
    states_offsets = rows * T * width + n * D + columns
    gates_offsets = rows * T * (G * width) + n * D + columns

    inputs = _load_each(Wx, wx_offsets, wx_stride_g, mask & (T > 0), FED_WX)
    for t in range(T):
        following = _load_each(
            Wx, wx_offsets + (t + 1) * wx_stride_t, wx_stride_g, mask & (t + 1 < T), FED_WX
        )
        # What multiplies R has been rounded: the same h that is stored.
        h = carried[0].to(dtype).to(OPERAND)
        preactivations = ()
        for k in tl.static_range(G):
            gate = tl.zeros([BB, DD], tl.float32)
            if FED_WX[k] >= 0:
                gate = inputs[k].to(tl.float32)
            if FED_B[k] >= 0:
                gate = gate + biases[k]
            if FED_R[k] >= 0:
                gate = tl.dot(h, blocks[k], gate, input_precision=PRECISION)
            preactivations = preactivations + (gate,)
        carried = step(carried, preactivations)
        _store_each(states, states_offsets, states_stride_s, mask, carried)
        if STORE_GATES:
            _store_each(gates, gates_offsets, width, mask, preactivations)
        states_offsets += width
        gates_offsets += G * width
        inputs = following
    last_offsets = rows * width + n * D + columns
    _store_each(last_states, last_offsets, tl.cast(B, tl.int64) * width, mask, carried)


@triton.jit
def scan_backward(
    R,
    states_initial,
    states,
    gates,
    d_states,
    d_last_states,
    d_gates,
    d_states_initial,
    clipval,
    T,
    B,
    N,
    initial_stride_s,
    initial_stride_b,
    initial_stride_n,
    initial_stride_d,
    d_states_stride_s,
    d_states_stride_b,
    d_states_stride_t,
    d_states_stride_n,
    d_states_stride_d,
    d_last_stride_s,
    d_last_stride_b,
    d_last_stride_n,
    d_last_stride_d,
    states_stride_s,
    D: tl.constexpr,
    DD: tl.constexpr,
    BB: tl.constexpr,
    FED_R: tl.constexpr,
    EVERY_STATE: tl.constexpr,
    EVERY_GATE: tl.constexpr,
    CUT: tl.constexpr,
    CLIP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    derivative: tl.constexpr,
):
    """The scan backwards, from the residuals states and gates that the forward one wrote.

    Writes d_gates [B, T, G, N, D], the gradients of the pre-activations, and d_states_initial
    [S, B, 1, N, D], both contiguous. The gradients of R, b and Wx follow from d_gates outside.
    CUT: no gradient through R. CLIP: that gradient is clipped to ±clipval at every step.
    """
    S: tl.constexpr = len(EVERY_STATE)
    G: tl.constexpr = len(EVERY_GATE)
    dtype = R.dtype.element_ty
    n = (tl.program_id(0) % N).to(tl.int64)
    rows = (tl.program_id(0) // N).to(tl.int64) * BB + tl.arange(0, BB)[:, None]
    columns = tl.arange(0, DD)[None, :]
    unit = columns < D
    mask = (rows < B) & unit

    # R's blocks as they are, [D, summed over]: d_gate @ block is Rᵀ @ d_gate for every row.
    produced = tl.arange(0, DD)[:, None]
    blocks = ()
    for k in tl.static_range(G):
        if FED_R[k] >= 0 and not CUT:
            block = tl.load(
                R + ((FED_R[k] * N + n) * D + produced) * D + columns,
                mask=(produced < D) & unit,
                other=0.0,
            )
            blocks = blocks + (block.to(OPERAND),)
        else:
            blocks = blocks + (0.0,)

    initial_offsets = rows * initial_stride_b + n * initial_stride_n + columns * initial_stride_d
    d_last_offsets = rows * d_last_stride_b + n * d_last_stride_n + columns * d_last_stride_d
    initial = ()
    d_carried = ()
    for s in tl.static_range(S):
        state = tl.load(
            states_initial + s * initial_stride_s + initial_offsets, mask=mask, other=0.0
        )
        initial = initial + (state.to(tl.float32),)
        d_state = tl.load(
            d_last_states + s * d_last_stride_s + d_last_offsets, mask=mask, other=0.0
        )
        d_carried = d_carried + (d_state.to(tl.float32),)

    width = N * D
    last = tl.cast(T, tl.int64) - 1
    # `states` is read one step earlier than the rest: the states that the step started from.
    states_offsets = (rows * T + last - 1) * width + n * D + columns
    gates_offsets = (rows * T + last) * (G * width) + n * D + columns
    d_states_offsets = (
        rows * d_states_stride_b + last * d_states_stride_t
        + n * d_states_stride_n + columns * d_states_stride_d
    )  # fmt: skip

    before = _load_each(states, states_offsets, states_stride_s, mask & (T > 1), EVERY_STATE)
    some = mask & (T > 0)
    preactivations = _load_each(gates, gates_offsets, width, some, EVERY_GATE)
    d_given = _load_each(d_states, d_states_offsets, d_states_stride_s, some, EVERY_STATE)
    for i in range(T):
        # The loads for step t - 1, issued before anything of step t waits.
        more = mask & (i + 1 < T)
        states_offsets -= width
        next_before = _load_each(
            states, states_offsets, states_stride_s, mask & (i + 2 < T), EVERY_STATE
        )
        next_preactivations = _load_each(gates, gates_offsets - G * width, width, more, EVERY_GATE)
        d_states_offsets -= d_states_stride_t
        next_d_given = _load_each(d_states, d_states_offsets, d_states_stride_s, more, EVERY_STATE)

        first = i + 1 == T
        values = ()
        gradients = ()
        for s in tl.static_range(S):
            values = values + (tl.where(first, initial[s], before[s].to(tl.float32)),)
            gradients = gradients + (d_carried[s] + d_given[s].to(tl.float32),)
        activations = ()
        for k in tl.static_range(G):
            activations = activations + (preactivations[k].to(tl.float32),)
        d_inputs = derivative(values, activations, gradients)

        d_carried = ()
        for s in tl.static_range(S):
            d_carried = d_carried + (d_inputs[s],)
        d_h = tl.zeros([BB, DD], tl.float32)
        for k in tl.static_range(G):
            d_gate = d_inputs[S + k].to(dtype)
            tl.store(d_gates + gates_offsets + k * width, d_gate, mask=mask)
            if FED_R[k] >= 0 and not CUT:
                d_h = tl.dot(d_gate.to(OPERAND), blocks[k], d_h, input_precision=PRECISION)
        if CLIP:
            d_h = tl.minimum(tl.maximum(d_h, -clipval), clipval)
        d_carried = (d_carried[0] + d_h,) + d_carried[1:]

        gates_offsets -= G * width
        before = next_before
        preactivations = next_preactivations
        d_given = next_d_given
    d_initial_offsets = rows * width + n * D + columns
    _store_each(d_states_initial, d_initial_offsets, tl.cast(B, tl.int64) * width, mask, d_carried)
