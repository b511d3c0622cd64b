# Triton's language has no types to check.
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator"
"""The programs that kernels.triton launches on a GPU, which explains them.

D and DV are the dimensions of keys and of values, G the query heads per kv head. Queries, keys and values (q, k, v) come with
all four strides; lists and their log weights (i, w) are contiguous in the last dim. A list entry of -1 is padding.
Row offsets are 64 bits wide. The maximum over nothing is -inf, and is replaced by 0 before it is subtracted.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _cap(score, softcap):
    """softcap * tanh(score / softcap)."""
    return softcap * (1.0 - 2.0 / (tl.exp(2.0 * score / softcap) + 1.0))


@triton.jit
def _add_block(score, v, top, total, summed):
    """A block's scores (K) and values (K, DV) joined with running softmaxes, one for each slot of a block: nothing crosses threads
    until the list is done."""
    new_top = tl.maximum(top, score)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = tl.exp(top - base)
    weight = tl.exp(score - base)
    return new_top, total * shrink + weight, summed * shrink[:, None] + weight[:, None] * v


@triton.jit
def _store_split(at, top, total, summed, partial_ptr, top_ptr, total_ptr, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """The running softmaxes of all slots joined, as partial result number `at`."""
    value_dims = tl.arange(0, BLOCK_DV)
    row_top = tl.max(top, 0)
    shrink = tl.exp(top - tl.where(row_top == float("-inf"), 0.0, row_top))
    tl.store(partial_ptr + at * DV + value_dims, tl.sum(summed * shrink[:, None], 0), mask=value_dims < DV)
    tl.store(top_ptr + at, row_top)
    tl.store(total_ptr + at, tl.sum(total * shrink, 0))


# Sizes that change between decode steps are not specialised on, or steps would wait for the compiler.
# Splits take turns at the blocks of a list, whose keys may stand together, and pass over blocks of padding.


@triton.jit(do_not_specialize=["si_b", "si_h", "si_q", "sw_b", "sw_h", "sw_q", "Q", "width", "splits"])
def rows_kernel(
    q_ptr, k_ptr, v_ptr, i_ptr, w_ptr, partial_ptr, top_ptr, total_ptr,
    sq_b, sq_h, sq_q, sq_d, sk_b, sk_h, sk_n, sk_d, sv_b, sv_h, sv_n, sv_d, si_b, si_h, si_q, sw_b, sw_h, sw_q,
    H, Q, G, width, splits, scaling, softcap,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_K: tl.constexpr,
    WEIGHTED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * Q, splits): one row's attention over one split of its list."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    query = row % Q
    head = row // Q % H
    batch = row // Q // H
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)
    q = tl.load(q_ptr + batch * sq_b + head * sq_h + query * sq_q + dims * sq_d, mask=dims < D, other=0.0)
    q = q.to(tl.float32) * scaling
    k_ptr += batch * sk_b + head // G * sk_h
    v_ptr += batch * sv_b + head // G * sv_h
    i_ptr += batch * si_b + head * si_h + query * si_q
    w_ptr += batch * sw_b + head * sw_h + query * sw_q

    top = tl.full([BLOCK_K], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_K], tl.float32)
    summed = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
    for start in range(split * BLOCK_K, width, splits * BLOCK_K):
        slots = start + tl.arange(0, BLOCK_K)
        index = tl.load(i_ptr + slots, mask=slots < width, other=-1).to(tl.int64)
        live = index >= 0
        if tl.max(index, 0) >= 0:
            k_at = k_ptr + index[:, None] * sk_n + dims[None, :] * sk_d
            k = tl.load(k_at, mask=live[:, None] & (dims < D)[None, :], other=0.0).to(tl.float32)
            v_at = v_ptr + index[:, None] * sv_n + value_dims[None, :] * sv_d
            v = tl.load(v_at, mask=live[:, None] & (value_dims < DV)[None, :], other=0.0).to(tl.float32)
            score = tl.sum(k * q[None, :], 1)
            if CAPPED:
                score = _cap(score, softcap)
            if WEIGHTED:
                score += tl.load(w_ptr + slots, mask=live, other=0.0)
            score = tl.where(live, score, float("-inf"))
            top, total, summed = _add_block(score, v, top, total, summed)
    _store_split(row * splits + split, top, total, summed, partial_ptr, top_ptr, total_ptr, DV, BLOCK_DV)


@triton.jit(do_not_specialize=["slots_of_head", "H", "shared", "splits"])
def forks_kernel(
    q_ptr, k_ptr, v_ptr, own_k_ptr, own_v_ptr, i_ptr, p_ptr, table_ptr, partial_ptr, top_ptr, total_ptr,
    sq_b, sq_h, sk_h, sk_n, sv_h, sv_n, sko_b, sko_h, sko_n, svo_b, svo_h, svo_n,
    slots_of_head, H, G, shared, splits, scaling, softcap,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_K: tl.constexpr,
    WEIGHTED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Grid (R * H, splits): attention of one head of a row over one split of its list, for rows of different contexts whose first
    `shared` keys are the same. Row r is fork table[r, 0], and its lists are the table[r, 2] slots from table[r, 1] on. p: a key's
    inclusion probability."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    head = row % H
    kv_head = head // G
    fork = tl.load(table_ptr + row // H * 4)
    first = tl.load(table_ptr + row // H * 4 + 1)
    width = tl.load(table_ptr + row // H * 4 + 2)
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)
    q = tl.load(q_ptr + fork * sq_b + head * sq_h + dims, mask=dims < D, other=0.0).to(tl.float32) * scaling
    k_ptr += kv_head * sk_h
    v_ptr += kv_head * sv_h
    own_k_ptr += fork * sko_b + kv_head * sko_h
    own_v_ptr += fork * svo_b + kv_head * svo_h
    i_ptr += head * slots_of_head + first
    p_ptr += head * slots_of_head + first

    top = tl.full([BLOCK_K], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_K], tl.float32)
    summed = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
    for start in range(split * BLOCK_K, width, splits * BLOCK_K):
        slots = start + tl.arange(0, BLOCK_K)
        index = tl.load(i_ptr + slots, mask=slots < width, other=-1).to(tl.int64)
        live = index >= 0
        if tl.max(index, 0) >= 0:
            # Two loads, since the compiler narrows those from a choice of pointers.
            common, own = (live & (index < shared))[:, None], (index >= shared)[:, None]
            k = tl.load(k_ptr + index[:, None] * sk_n + dims[None, :], mask=common & (dims < D)[None, :], other=0.0)
            k_at = own_k_ptr + (index - shared)[:, None] * sko_n + dims[None, :]
            k = tl.load(k_at, mask=own & (dims < D)[None, :], other=k).to(tl.float32)
            v = tl.load(
                v_ptr + index[:, None] * sv_n + value_dims[None, :], mask=common & (value_dims < DV)[None, :], other=0.0
            )
            v_at = own_v_ptr + (index - shared)[:, None] * svo_n + value_dims[None, :]
            v = tl.load(v_at, mask=own & (value_dims < DV)[None, :], other=v).to(tl.float32)
            score = tl.sum(k * q[None, :], 1)
            if CAPPED:
                score = _cap(score, softcap)
            if WEIGHTED:
                score -= tl.log(tl.maximum(tl.load(p_ptr + slots, mask=live, other=1.0), 1e-30))
            score = tl.where(live, score, float("-inf"))
            top, total, summed = _add_block(score, v, top, total, summed)
    _store_split(row * splits + split, top, total, summed, partial_ptr, top_ptr, total_ptr, DV, BLOCK_DV)


@triton.jit(do_not_specialize=["si_b", "si_h", "sw_b", "sw_h", "sw_q", "Q", "tiles", "width", "chunk", "splits"])
def groups_kernel(
    q_ptr, k_ptr, v_ptr, i_ptr, w_ptr, partial_ptr, top_ptr, total_ptr,
    sq_b, sq_h, sq_q, sq_d, sk_b, sk_h, sk_n, sk_d, sv_b, sv_h, sv_n, sv_d, si_b, si_h, sw_b, sw_h, sw_q,
    HKV, Q, G, tiles, width, chunk, splits, scaling, softcap,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, WEIGHTED: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hkv * tiles, splits): a tile of a kv head's G * Q rows over one split of their common list.

    A tile holds whole queries (all heads of one, then of the next), and reads only keys that one of its rows chose.
    """
    program = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    kv_head = program // tiles % HKV
    batch = program // tiles // HKV
    member = program % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = member < G * Q
    query = member // G
    head = kv_head * G + member % G
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)
    q_at = q_ptr + batch * sq_b + (head * sq_h + query * sq_q)[:, None] + dims[None, :] * sq_d
    q = tl.load(q_at, mask=is_row[:, None] & (dims < D)[None, :], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    k_ptr += batch * sk_b + kv_head * sk_h
    v_ptr += batch * sv_b + kv_head * sv_h
    i_ptr += batch * si_b + kv_head * si_h
    w_rows = w_ptr + batch * sw_b + head * sw_h + query * sw_q

    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    summed = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    first = split * chunk
    for start in range(first, tl.minimum(first + chunk, width), BLOCK_K):
        slots = start + tl.arange(0, BLOCK_K)
        index = tl.load(i_ptr + slots, mask=slots < width, other=-1).to(tl.int64)
        live = index >= 0
        if WEIGHTED:
            w_mask = is_row[:, None] & live[None, :]
            log_weight = tl.load(w_rows[:, None] + slots[None, :], mask=w_mask, other=float("-inf"))
            live = live & (tl.max(log_weight, 0) > float("-inf"))
        k_at = k_ptr + index[:, None] * sk_n + dims[None, :] * sk_d
        k = tl.load(k_at, mask=live[:, None] & (dims < D)[None, :], other=0.0)
        v_at = v_ptr + index[:, None] * sv_n + value_dims[None, :] * sv_d
        v = tl.load(v_at, mask=live[:, None] & (value_dims < DV)[None, :], other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        # "ieee": the default would round float32 inputs to 10 bits. It changes nothing for 16-bit inputs.
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        if CAPPED:
            score = _cap(score, softcap)
        if WEIGHTED:
            score += log_weight
        else:
            score = tl.where(live[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp(top - base)
        weight = tl.exp(score - base[:, None])
        total = total * shrink + tl.sum(weight, 1)
        summed = tl.dot(weight.to(v.dtype), v, summed * shrink[:, None], input_precision="ieee")
        top = new_top

    at = ((batch * HKV * G + head) * Q + query) * splits + split
    partial_at = partial_ptr + at[:, None] * DV + value_dims[None, :]
    tl.store(partial_at, summed, mask=is_row[:, None] & (value_dims < DV)[None, :])
    tl.store(top_ptr + at, top, mask=is_row)
    tl.store(total_ptr + at, total, mask=is_row)


@triton.jit(do_not_specialize=["Q", "splits"])
def merge_kernel(
    partial_ptr, top_ptr, total_ptr, sink_ptr, out_ptr, lse_ptr, H, Q, splits,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * Q,): the splits of one row joined, as output (B, Q, H, DV) and log-sum-exp (B, H, Q)."""
    row = tl.program_id(0).to(tl.int64)
    query = row % Q
    head = row // Q % H
    batch = row // Q // H
    dims = tl.arange(0, BLOCK_DV)
    # As in rows_kernel, every slot keeps a running softmax of its own.
    top = tl.full([BLOCK_S], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_S], tl.float32)
    summed = tl.zeros([BLOCK_S, BLOCK_DV], tl.float32)
    for start in range(0, splits, BLOCK_S):
        slots = start + tl.arange(0, BLOCK_S)
        live = slots < splits
        at = row * splits + slots
        split_top = tl.load(top_ptr + at, mask=live, other=float("-inf"))
        split_total = tl.load(total_ptr + at, mask=live, other=0.0)
        partial_at = partial_ptr + at[:, None] * DV + dims[None, :]
        partial = tl.load(partial_at, mask=live[:, None] & (dims < DV)[None, :], other=0.0)
        new_top = tl.maximum(top, split_top)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp(top - base)
        weight = tl.exp(split_top - base)
        total = total * shrink + split_total * weight
        summed = summed * shrink[:, None] + partial * weight[:, None]
        top = new_top
    row_top = tl.max(top, 0)
    if SINKS:
        sink = tl.load(sink_ptr + head)
        row_top = tl.maximum(row_top, sink)
    base = tl.where(row_top == float("-inf"), 0.0, row_top)
    shrink = tl.exp(top - base)
    row_total = tl.sum(total * shrink, 0)
    if SINKS:
        row_total += tl.exp(sink - base)
    divisor = tl.where(row_total == 0.0, 1.0, row_total)
    out = tl.sum(summed * shrink[:, None], 0) / divisor
    out_at = out_ptr + ((batch * Q + query) * H + head) * DV + dims
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=dims < DV)
    tl.store(lse_ptr + row, tl.where(row_total == 0.0, float("-inf"), tl.log(divisor) + base))


@triton.jit
def _mix(x):
    """maskers/uniforms.py's integer finaliser, of unsigned 32-bit numbers."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["HKV", "Q", "N"])
def uniforms_kernel(low_ptr, high_ptr, queries_ptr, keys_ptr, out_ptr, HKV, Q, N, BLOCK: tl.constexpr):
    """Grid (B * HKV * Q, blocks of keys): uniforms (B, HKV, Q, N) from halves of words (B, HKV) and positions (B, Q) and (B, N)."""
    row = tl.program_id(0).to(tl.int64)
    query = row % Q
    word = row // Q
    batch = word // HKV
    keys = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(queries_ptr + batch * Q + query).to(tl.uint32)
    low = _mix(tl.load(low_ptr + word).to(tl.uint32) ^ (position * 0x9E3779B9))
    high = _mix(tl.load(high_ptr + word).to(tl.uint32) ^ (position * 0x5851F42D))
    column = tl.load(keys_ptr + batch * N + keys, mask=keys < N, other=0).to(tl.uint32)
    bits = _mix(_mix(low ^ (column * 0x2545F491)) ^ high)
    tl.store(out_ptr + row * N + keys, (bits >> 8).to(tl.float32) * 5.9604644775390625e-08, mask=keys < N)


#: Whether the kernels above run in the interpreter: decided when they are defined.
INTERPRETED = not isinstance(rows_kernel, triton.JITFunction)
