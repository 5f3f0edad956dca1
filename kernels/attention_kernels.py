"""The six Triton kernels behind `deitfast.kernels.attention`, and the tile access they share.

A program owns one head of one sample, whole in the short kernels, a block of its rows in the others. In the comments:
B samples, N tokens, H heads of D channels, C = D padded to a power of two. Scores are kept in base 2:
t = scale * log2(e) * (q . k), and lse = log2(sum_keys 2^t), so that the hardware's exp2 serves.

Rows past N and channels past D are read as zeros and never written. Zeros alone do not make the padding keys harmless:
2^(0 - lse) overflows where all real scores lie far below zero, so their scores are set to -inf before the exponential.
Padding queries have lse = +inf in the backward, hence probability zero.

With path_scale, drop-path's factor s of each sample, out is stored times s and dout comes without it: the gradient of
the attention's own result is s * dout, and rowsum(out * dout) has its factor already.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(source, batch, head, row, N, HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr,
              TMA: tl.constexpr):  # fmt: skip
    """(ROWS, C) tile of one head from row `row` on. source: tensor (B, N, HEADS, D), or a descriptor, whose hardware
    does the masking: of (B, N, HEADS * D) with block (1, ROWS, C) where D fills the tile, else of the (B, HEADS, N, D)
    view with block (1, 1, ROWS, C), which ends with the head.
    """
    if TMA:
        if C == D:
            return source.load([batch, row, head * D]).reshape(ROWS, C)
        else:
            return source.load([batch, head, row, 0]).reshape(ROWS, C)
    else:
        rows = tl.arange(0, ROWS)
        channels = tl.arange(0, C)
        start = source + (batch.to(tl.int64) * N + row) * (HEADS * D) + head * D
        mask = (row + rows < N)[:, None]
        if C != D:
            mask &= (channels < D)[None, :]
        return tl.load(start + rows[:, None] * (HEADS * D) + channels[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(target, tile, batch, head, row, N, HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
               C: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Write a (ROWS, C) tile where `load_tile` reads it, rounded to the dtype of `target`."""
    if TMA:
        if C == D:
            target.store([batch, row, head * D], tile.to(target.dtype).reshape(1, ROWS, C))
        else:
            target.store([batch, head, row, 0], tile.to(target.dtype).reshape(1, 1, ROWS, C))
    else:
        rows = tl.arange(0, ROWS)
        channels = tl.arange(0, C)
        start = target + (batch.to(tl.int64) * N + row) * (HEADS * D) + head * D
        mask = (row + rows < N)[:, None]
        if C != D:
            mask &= (channels < D)[None, :]
        tl.store(start + rows[:, None] * (HEADS * D) + channels[None, :], tile.to(target.dtype.element_ty), mask=mask)


@triton.jit
def product(a, b, accumulator=None):
    """a @ b in fp32; fp32 operands are not rounded to tf32."""
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def key_scores(q, k, first_key, N, KEYS: tl.constexpr):
    """(queries, KEYS) dot products, -inf for keys past N."""
    return tl.where((first_key + tl.arange(0, KEYS) < N)[None, :], product(q, k.T), float("-inf"))


@triton.jit
def store_column_sums(sums, grad_q, part, head, scale, H: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    """sums (blocks of queries, H, D) fp32: the sum of dq over this block's queries; padding queries have none."""
    channels = tl.arange(0, C)
    total = tl.sum(grad_q, 0) * scale
    tl.store(sums + (part.to(tl.int64) * H + head) * D + channels, total, mask=channels < D)


@triton.jit(do_not_specialize=["N"])
def attention_fwd_short_kernel(
    q, kv1,  # (B, N, 3H, D), blocks of QUERIES and KEYS1 rows
    kv2, kv3,  # the same tensor, never descriptors; no kv3 where KEYS3 is 0
    out,  # (B, N, H, D)
    lse,  # (B, H, N) fp32
    path_scale,  # (B,) fp32 or None
    N, scale_log2,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, QUERIES: tl.constexpr,
    KEYS1: tl.constexpr, KEYS2: tl.constexpr, KEYS3: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A whole head in one program, all keys at once in two or three pieces (197 keys: 128 + 64 + 16; KEYS3 may be 0).

    Exact two-pass softmax: no running maximum, no rescaling. Keys and values are read once; queries pass in a loop.
    """
    sequence = tl.program_id(0)
    b, h = sequence // H, sequence % H
    LAST: tl.constexpr = KEYS1 + KEYS2

    if not TMA:
        k1 = load_tile(kv1, b, H + h, 0, N, 3 * H, D, KEYS1, C, TMA)
    k2 = load_tile(kv2, b, H + h, KEYS1, N, 3 * H, D, KEYS2, C, TMA=False)
    if not TMA:
        v1 = load_tile(kv1, b, 2 * H + h, 0, N, 3 * H, D, KEYS1, C, TMA)
    v2 = load_tile(kv2, b, 2 * H + h, KEYS1, N, 3 * H, D, KEYS2, C, TMA=False)
    if KEYS3 > 0:
        k3 = load_tile(kv3, b, H + h, LAST, N, 3 * H, D, KEYS3, C, TMA=False)
        v3 = load_tile(kv3, b, 2 * H + h, LAST, N, 3 * H, D, KEYS3, C, TMA=False)
    if TMA:  # a descriptor's load is waited for at once: what goes through pointers is under way by then
        k1 = load_tile(kv1, b, H + h, 0, N, 3 * H, D, KEYS1, C, TMA)
        v1 = load_tile(kv1, b, 2 * H + h, 0, N, 3 * H, D, KEYS1, C, TMA)

    for row in tl.range(0, N, QUERIES):
        query = load_tile(q, b, h, row, N, 3 * H, D, QUERIES, C, TMA)
        s1 = product(query, k1.T)
        s2 = key_scores(query, k2, KEYS1, N, KEYS2)
        top = tl.maximum(tl.max(s1, 1), tl.max(s2, 1))
        if KEYS3 > 0:
            s3 = key_scores(query, k3, LAST, N, KEYS3)
            top = tl.maximum(top, tl.max(s3, 1))
        top *= scale_log2

        p1 = tl.exp2(s1 * scale_log2 - top[:, None])
        p2 = tl.exp2(s2 * scale_log2 - top[:, None])
        total = tl.sum(p1, 1) + tl.sum(p2, 1)
        result = product(p2.to(v2.dtype), v2, product(p1.to(v1.dtype), v1))
        if KEYS3 > 0:
            p3 = tl.exp2(s3 * scale_log2 - top[:, None])
            total += tl.sum(p3, 1)
            result = product(p3.to(v3.dtype), v3, result)

        rows = row + tl.arange(0, QUERIES)
        tl.store(lse + sequence.to(tl.int64) * N + rows, top + tl.log2(total), mask=rows < N)
        # One division a row instead of one a value, where ptxas does not spill for it.
        result = result * (1.0 / total)[:, None] if TMA else result / total[:, None]
        if path_scale is not None:
            result *= tl.load(path_scale + b)
        store_tile(out, result, b, h, row, N, H, D, QUERIES, C, TMA)


@triton.jit(do_not_specialize=["N"])
def attention_fwd_kernel(
    q, kv,  # (B, N, 3H, D), blocks of QUERIES and KEYS rows
    out,  # (B, N, H, D)
    lse,  # (B, H, N) fp32
    path_scale,  # (B,) fp32 or None
    N, scale_log2,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A loop over blocks of keys with a running maximum and sum."""
    blocks = tl.cdiv(N, QUERIES)
    sequence = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * QUERIES
    b, h = sequence // H, sequence % H

    query = load_tile(q, b, h, row, N, 3 * H, D, QUERIES, C, TMA)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    result = tl.zeros((QUERIES, C), tl.float32)
    for key in tl.range(0, N, KEYS):
        s = key_scores(query, load_tile(kv, b, H + h, key, N, 3 * H, D, KEYS, C, TMA), key, N, KEYS)
        new_top = tl.maximum(top, tl.max(s, 1) * scale_log2)
        p = tl.exp2(s * scale_log2 - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v = load_tile(kv, b, 2 * H + h, key, N, 3 * H, D, KEYS, C, TMA)
        result = product(p.to(v.dtype), v, result * shrink[:, None])
        top = new_top

    rows = row + tl.arange(0, QUERIES)
    tl.store(lse + sequence.to(tl.int64) * N + rows, top + tl.log2(total), mask=rows < N)
    result /= total[:, None]
    if path_scale is not None:
        result *= tl.load(path_scale + b)
    store_tile(out, result, b, h, row, N, H, D, QUERIES, C, TMA)


@triton.jit(do_not_specialize=["N"])
def attention_bwd_short_kernel(
    q, kv,  # (B, N, 3H, D), blocks of QUERIES and KEYS rows
    out, dout,  # (B, N, H, D), blocks of QUERIES rows
    lse,  # (B, H, N) fp32
    dq, dkv,  # (B, N, 3H, D), written; blocks of QUERIES and KEYS rows
    sums,  # (B, H, D) fp32 or None, written: see store_column_sums
    path_scale,  # (B,) fp32 or None
    N, scale, scale_log2,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A whole head in one program (N <= QUERIES): five matrix products, dq stays in registers over the loop of keys."""
    sequence = tl.program_id(0)
    b, h = sequence // H, sequence % H
    rows = tl.arange(0, QUERIES)

    # First: it is on its way while the loads of descriptors are waited for, one by one.
    row_lse = tl.load(lse + sequence.to(tl.int64) * N + rows, mask=rows < N, other=float("inf"))
    if path_scale is not None:
        factor = tl.load(path_scale + b)
    o = load_tile(out, b, h, 0, N, H, D, QUERIES, C, TMA)
    g = load_tile(dout, b, h, 0, N, H, D, QUERIES, C, TMA)
    delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    query = load_tile(q, b, h, 0, N, 3 * H, D, QUERIES, C, TMA)
    grad_q = tl.zeros((QUERIES, C), tl.float32)
    for key in tl.range(0, N, KEYS):
        k = load_tile(kv, b, H + h, key, N, 3 * H, D, KEYS, C, TMA)
        v = load_tile(kv, b, 2 * H + h, key, N, 3 * H, D, KEYS, C, TMA)
        p = tl.exp2(key_scores(query, k, key, N, KEYS) * scale_log2 - row_lse[:, None])
        grad_v = product(tl.trans(p.to(g.dtype)), g)
        if path_scale is not None:
            grad_v *= factor
        store_tile(dkv, grad_v, b, 2 * H + h, key, N, 3 * H, D, KEYS, C, TMA)
        grad_p = product(g, v.T)
        if path_scale is not None:
            grad_p *= factor
        ds = (p * (grad_p - delta[:, None])).to(g.dtype)
        store_tile(dkv, product(tl.trans(ds), query) * scale, b, H + h, key, N, 3 * H, D, KEYS, C, TMA)
        grad_q = product(ds, k, grad_q)
    if sums is not None:
        store_column_sums(sums, grad_q, b, h, scale, H, D, C)
    store_tile(dq, grad_q * scale, b, h, 0, N, 3 * H, D, QUERIES, C, TMA)


@triton.jit
def _transposed_tile(
    query, g, k, v, real, lse, delta, factor, one, scale_log2, grad_q, grad_k, grad_v, ROWS: tl.constexpr
):  # fmt: skip
    """What a tile of queries (ROWS, C) and one of keys add to the three gradients; see the kernel below."""
    s = tl.where(real[:, None], product(k, query.T), float("-inf"))
    p = tl.exp2(s * scale_log2 - tl.load(lse + tl.arange(0, ROWS))[None, :])
    grad_v = product(p.to(g.dtype), g, grad_v)
    grad_p = product(v, g.T)
    if factor is not None:
        grad_p *= factor
    ds = (p * (grad_p - tl.load(delta + tl.arange(0, ROWS))[None, :])).to(g.dtype)
    grad_k = product(ds, query, grad_k)
    if ROWS < 64:  # too few rows for a tensor core's instruction, so the gradient is transposed too
        grad_q = product(k.T, ds, grad_q)
    else:
        grad_q = product(tl.trans(ds), k, grad_q)
    # A result that nothing uses before the next round stays in flight, and ptxas then serialises every product (C7515).
    return grad_q * one, grad_k, grad_v


@triton.jit(do_not_specialize=["N"])
def attention_bwd_transposed_kernel(
    q, kv,  # (B, N, 3H, D), blocks of QUERIES and KEYS rows
    dout,  # (B, N, H, D), blocks of QUERIES rows
    q_rows, out_rows, dout_rows,  # q, out and dout, never descriptors
    lse,  # (B, H, N) fp32
    statistics,  # (B * H, 2, 256) fp32, written and read: lse and delta of all rows, padding included
    dq, dkv,  # (B, N, 3H, D), written; blocks of QUERIES and KEYS rows
    dq_rows,  # dq, never a descriptor
    sums,  # (B, H, D) fp32 or None, written: see store_column_sums
    path_scale,  # (B,) fp32 or None
    N, scale, scale_log2,
    one,  # 1.0, unknown to the compiler
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, LAST: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """A whole head in one program, like `attention_bwd_short_kernel`, with transposed scores (keys, queries).

    So p and ds, as they come out of a product, are the first operand of the next one without leaving the registers, for
    dv and dk; ds alone crosses shared memory, for dq. Queries come in three tiles of 64 and one of 16, each with a part
    of dq in registers, so N <= 208; keys pass in a loop.
    """
    sequence = tl.program_id(0)
    b, h = sequence // H, sequence % H
    ROWS: tl.constexpr = 3 * QUERIES
    PADDED: tl.constexpr = 4 * QUERIES
    row_lse = statistics + sequence.to(tl.int64) * (2 * PADDED)
    row_delta = row_lse + PADDED
    factor = None
    if path_scale is not None:
        factor = tl.load(path_scale + b)

    rows = tl.arange(0, PADDED)
    o = load_tile(out_rows, b, h, 0, N, H, D, PADDED, C, TMA=False)
    all_g = load_tile(dout_rows, b, h, 0, N, H, D, PADDED, C, TMA=False)
    tl.store(row_lse + rows, tl.load(lse + sequence.to(tl.int64) * N + rows, mask=rows < N, other=float("inf")))
    tl.store(row_delta + rows, tl.sum(o.to(tl.float32) * all_g.to(tl.float32), 1))
    tl.debug_barrier()

    grad_q0 = tl.zeros((QUERIES, C), tl.float32)
    grad_q1 = tl.zeros((QUERIES, C), tl.float32)
    grad_q2 = tl.zeros((QUERIES, C), tl.float32)
    grad_q3 = tl.zeros((C, LAST), tl.float32)
    for key in tl.range(0, N, KEYS):
        real = key + tl.arange(0, KEYS) < N
        k = load_tile(kv, b, H + h, key, N, 3 * H, D, KEYS, C, TMA)
        v = load_tile(kv, b, 2 * H + h, key, N, 3 * H, D, KEYS, C, TMA)
        query = load_tile(q, b, h, 0, N, 3 * H, D, QUERIES, C, TMA)
        g = load_tile(dout, b, h, 0, N, H, D, QUERIES, C, TMA)
        grad_q0, grad_k, grad_v = _transposed_tile(
            query, g, k, v, real, row_lse, row_delta, factor, one, scale_log2, grad_q0, None, None, QUERIES
        )
        query = load_tile(q, b, h, QUERIES, N, 3 * H, D, QUERIES, C, TMA)
        g = load_tile(dout, b, h, QUERIES, N, H, D, QUERIES, C, TMA)
        grad_q1, grad_k, grad_v = _transposed_tile(
            query, g, k, v, real, row_lse + QUERIES, row_delta + QUERIES, factor, one, scale_log2,
            grad_q1, grad_k, grad_v, QUERIES,
        )  # fmt: skip
        query = load_tile(q, b, h, 2 * QUERIES, N, 3 * H, D, QUERIES, C, TMA)
        g = load_tile(dout, b, h, 2 * QUERIES, N, H, D, QUERIES, C, TMA)
        grad_q2, grad_k, grad_v = _transposed_tile(
            query, g, k, v, real, row_lse + 2 * QUERIES, row_delta + 2 * QUERIES, factor, one, scale_log2,
            grad_q2, grad_k, grad_v, QUERIES,
        )  # fmt: skip
        query = load_tile(q_rows, b, h, ROWS, N, 3 * H, D, LAST, C, TMA=False)
        g = load_tile(dout_rows, b, h, ROWS, N, H, D, LAST, C, TMA=False)
        grad_q3, grad_k, grad_v = _transposed_tile(
            query, g, k, v, real, row_lse + ROWS, row_delta + ROWS, factor, one, scale_log2,
            grad_q3, grad_k, grad_v, LAST,
        )  # fmt: skip
        if path_scale is not None:
            grad_v *= factor
        store_tile(dkv, grad_v, b, 2 * H + h, key, N, 3 * H, D, KEYS, C, TMA)
        store_tile(dkv, grad_k * scale, b, H + h, key, N, 3 * H, D, KEYS, C, TMA)
    if sums is not None:
        channels = tl.arange(0, C)
        total = tl.sum(grad_q0 + grad_q1 + grad_q2, 0) + tl.sum(grad_q3.T, 0)
        tl.store(sums + sequence.to(tl.int64) * D + channels, total * scale, mask=channels < D)
    store_tile(dq, grad_q0 * scale, b, h, 0, N, 3 * H, D, QUERIES, C, TMA)
    store_tile(dq, grad_q1 * scale, b, h, QUERIES, N, 3 * H, D, QUERIES, C, TMA)
    store_tile(dq, grad_q2 * scale, b, h, 2 * QUERIES, N, 3 * H, D, QUERIES, C, TMA)
    store_tile(dq_rows, grad_q3.T * scale, b, h, ROWS, N, 3 * H, D, LAST, C, TMA=False)


@triton.jit(do_not_specialize=["N"])
def attention_bwd_dq_kernel(
    q, kv,  # (B, N, 3H, D), blocks of QUERIES and KEYS rows
    out, dout,  # (B, N, H, D), blocks of QUERIES rows
    lse,  # (B, H, N) fp32
    delta,  # (B, H, N) fp32, written: rowsum(out * dout), which the dk, dv kernel reads
    dq,  # (B, N, 3H, D), its first third written; blocks of QUERIES rows
    sums,  # (B * blocks of queries, H, D) fp32 or None, written: see store_column_sums
    path_scale,  # (B,) fp32 or None
    N, scale, scale_log2,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of queries, in a loop over keys."""
    blocks = tl.cdiv(N, QUERIES)
    sequence = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * QUERIES
    b, h = sequence // H, sequence % H
    rows = row + tl.arange(0, QUERIES)
    statistics = sequence.to(tl.int64) * N + rows

    g = load_tile(dout, b, h, row, N, H, D, QUERIES, C, TMA)
    o = load_tile(out, b, h, row, N, H, D, QUERIES, C, TMA)
    row_delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    tl.store(delta + statistics, row_delta, mask=rows < N)
    query = load_tile(q, b, h, row, N, 3 * H, D, QUERIES, C, TMA)
    row_lse = tl.load(lse + statistics, mask=rows < N, other=float("inf"))
    if path_scale is not None:
        factor = tl.load(path_scale + b)
    grad_q = tl.zeros((QUERIES, C), tl.float32)
    for key in tl.range(0, N, KEYS):
        k = load_tile(kv, b, H + h, key, N, 3 * H, D, KEYS, C, TMA)
        v = load_tile(kv, b, 2 * H + h, key, N, 3 * H, D, KEYS, C, TMA)
        p = tl.exp2(key_scores(query, k, key, N, KEYS) * scale_log2 - row_lse[:, None])
        grad_p = product(g, v.T)
        if path_scale is not None:
            grad_p *= factor
        ds = (p * (grad_p - row_delta[:, None])).to(k.dtype)
        grad_q = product(ds, k, grad_q)
    if sums is not None:
        store_column_sums(sums, grad_q, b * blocks + row // QUERIES, h, scale, H, D, C)
    store_tile(dq, grad_q * scale, b, h, row, N, 3 * H, D, QUERIES, C, TMA)


@triton.jit(do_not_specialize=["N"])
def attention_bwd_dkdv_kernel(
    q, kv,  # (B, N, 3H, D), blocks of QUERIES and KEYS rows
    dout,  # (B, N, H, D), blocks of QUERIES rows
    lse, delta,  # (B, H, N) fp32
    dkv,  # (B, N, 3H, D), its last two thirds written; blocks of KEYS rows
    path_scale,  # (B,) fp32 or None
    N, scale, scale_log2,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of keys and values, in a loop over queries, with transposed scores (keys, queries).

    Padding keys may overflow here: their rows touch no other row and are not written.
    """
    blocks = tl.cdiv(N, KEYS)
    sequence = tl.program_id(0) // blocks
    key = tl.program_id(0) % blocks * KEYS
    b, h = sequence // H, sequence % H

    k = load_tile(kv, b, H + h, key, N, 3 * H, D, KEYS, C, TMA)
    v = load_tile(kv, b, 2 * H + h, key, N, 3 * H, D, KEYS, C, TMA)
    if path_scale is not None:
        factor = tl.load(path_scale + b)
    grad_k = tl.zeros((KEYS, C), tl.float32)
    grad_v = tl.zeros((KEYS, C), tl.float32)
    for row in tl.range(0, N, QUERIES):
        rows = row + tl.arange(0, QUERIES)
        statistics = sequence.to(tl.int64) * N + rows
        row_lse = tl.load(lse + statistics, mask=rows < N, other=float("inf"))
        row_delta = tl.load(delta + statistics, mask=rows < N, other=0.0)
        query = load_tile(q, b, h, row, N, 3 * H, D, QUERIES, C, TMA)
        g = load_tile(dout, b, h, row, N, H, D, QUERIES, C, TMA)
        p = tl.exp2(product(k, query.T) * scale_log2 - row_lse[None, :])
        grad_v = product(p.to(g.dtype), g, grad_v)
        grad_p = product(v, g.T)
        if path_scale is not None:
            grad_p *= factor
        ds = (p * (grad_p - row_delta[None, :])).to(g.dtype)
        grad_k = product(ds, query, grad_k)
    if path_scale is not None:
        grad_v *= factor
    store_tile(dkv, grad_k * scale, b, H + h, key, N, 3 * H, D, KEYS, C, TMA)
    store_tile(dkv, grad_v, b, 2 * H + h, key, N, 3 * H, D, KEYS, C, TMA)
