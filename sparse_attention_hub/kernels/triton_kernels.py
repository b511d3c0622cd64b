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


# Sizes that change between decode steps are not specialised on, or steps would wait for the compiler.


@triton.jit(do_not_specialize=["si_b", "si_h", "si_q", "sw_b", "sw_h", "sw_q", "Q", "width", "chunk", "splits"])
def rows_kernel(
    q_ptr, k_ptr, v_ptr, i_ptr, w_ptr, partial_ptr, top_ptr, total_ptr,
    sq_b, sq_h, sq_q, sq_d, sk_b, sk_h, sk_n, sk_d, sv_b, sv_h, sv_n, sv_d, si_b, si_h, si_q, sw_b, sw_h, sw_q,
    H, Q, G, width, chunk, splits, scaling, softcap,
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

    # Every slot of the block keeps a running softmax of its own: nothing crosses threads until the list is done.
    top = tl.full([BLOCK_K], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_K], tl.float32)
    summed = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
    first = split * chunk
    for start in range(first, tl.minimum(first + chunk, width), BLOCK_K):
        slots = start + tl.arange(0, BLOCK_K)
        index = tl.load(i_ptr + slots, mask=slots < width, other=-1).to(tl.int64)
        live = index >= 0
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
        new_top = tl.maximum(top, score)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp(top - base)
        weight = tl.exp(score - base)
        total = total * shrink + weight
        summed = summed * shrink[:, None] + weight[:, None] * v
        top = new_top

    row_top = tl.max(top, 0)
    shrink = tl.exp(top - tl.where(row_top == float("-inf"), 0.0, row_top))
    at = row * splits + split
    tl.store(partial_ptr + at * DV + value_dims, tl.sum(summed * shrink[:, None], 0), mask=value_dims < DV)
    tl.store(top_ptr + at, row_top)
    tl.store(total_ptr + at, tl.sum(total * shrink, 0))


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


#: Whether the kernels above run in the interpreter: decided when they are defined.
INTERPRETED = not isinstance(rows_kernel, triton.JITFunction)
