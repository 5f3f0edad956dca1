"""Self-attention straight from the packed qkv projection, without a permute or a copy.

    out[n, h] = sum_m softmax_m(scale * q[n, h] . k[m, h]) v[m, h]

qkv (..., N, 3D) holds [q | k | v], each D = H * d channels, heads contiguous; out (..., N, D). All leading dimensions
are batch. Statistics and accumulators are fp32; fp32 inputs are multiplied in fp32, never in tf32.

Saved for the backward: qkv, out and lse (B, H, N) fp32, the base-2 logarithm of each row's sum of exponentials.
Recomputed: the probabilities, p = 2^(scale * log2(e) * q . k - lse). With g = dL/dout:

    dv = p^T g      ds = p * (g v^T - rowsum(out * g))      dq = scale * ds k      dk = scale * ds^T q

Every gradient is written once, into its third of a packed (..., N, 3D) tensor: no atomics, the same bits in every run.

Which kernel runs depends on the chip, the dtype, d and N alone:

- 129 to 256 tokens in 16 bit with d <= 64 (DeiT at 224 pixels): a program owns a whole head. The forward keeps its keys
  and values on chip and passes all scores of a block of queries through an exact softmax. The backward keeps queries
  and their gradient on chip and needs five matrix products; it runs where the launch table has an entry for it. Where
  d = 64, sm_90 has a second one, with transposed scores.
- everything else: a loop over blocks of keys with a running softmax; the backward is two kernels, seven products.

In 16 bit, sm_90 and sm_100 load and store through tensor descriptors (TMA), which clip at N and at d; other chips use
pointers and masks. Head dimensions of 80 and 96 are padded to 128, on chip only. The tile sizes are chosen from what
compiles for each chip without a spill; none has been timed on a GPU yet.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deitfast.kernels.attention_kernels import (
    attention_bwd_dkdv_kernel,
    attention_bwd_dq_kernel,
    attention_bwd_short_kernel,
    attention_bwd_transposed_kernel,
    attention_fwd_kernel,
    attention_fwd_short_kernel,
)
from deitfast.kernels.common import (
    INTERPRETED,
    Launch,
    architecture,
    autocast,
    check_dtypes,
    check_last_contiguous,
    has_data,
    launch,
    on_16_bytes,
    op,
    runs_triton,
)
from deitfast.kernels.tunable import tunable

HEAD_DIMS = (32, 64, 80, 96, 128)
LOG2_E = math.log2(math.e)
SHORT_TOKENS = range(129, 257)
"""Sequence lengths of the whole-sequence kernels; shorter ones fill their tiles too badly."""


def attention_reference(qkv: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """The op in eager PyTorch: qkv (..., N, 3D) -> (..., N, D). Any floating dtype, any head dimension."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).movedim(-3, 0).transpose(-3, -2)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(-3, -2).flatten(-2)


# Launch tables -------------------------------------------------------------------------------------------------------

Table = dict[str, dict[tuple[int, int], Launch]]
"""Kernel -> (bytes per element, padded head dimension, at least 64) -> launch."""


def _launch(queries: int, keys: int, num_warps: int, num_stages: int, tma: bool = False) -> Launch:
    return Launch({"QUERIES": queries, "KEYS": keys, "TMA": int(tma)}, num_warps, num_stages)


# fp32 products run on the ordinary cores, whose operands take so many registers that tiles are small (and more with TMA
# than with pointers). They fit the smallest supported shared memory, 99 KB, so these entries serve every chip.
_FP32: Table = {
    "fwd": {(4, 64): _launch(32, 32, 8, 1), (4, 128): _launch(32, 16, 8, 1)},
    "bwd_dq": {(4, 64): _launch(32, 32, 8, 1), (4, 128): _launch(16, 16, 8, 1)},
    "bwd_dkdv": {(4, 64): _launch(32, 32, 8, 1), (4, 128): _launch(16, 32, 8, 1)},
}
_POINTERS: Table = {
    # KEYS of the short forward follow from the number of tokens.
    "fwd_short": {(2, 64): _launch(32, 0, 4, 1)},
    "fwd": {(2, 64): _launch(64, 64, 4, 2), (2, 128): _launch(64, 64, 4, 2)},
    "bwd_dq": {(2, 64): _launch(64, 64, 4, 2), (2, 128): _launch(64, 32, 4, 2)},
    "bwd_dkdv": {(2, 64): _launch(32, 64, 4, 2), (2, 128): _launch(64, 64, 8, 2)},
}
_TMA: Table = {
    "fwd_short": {(2, 64): _launch(64, 0, 4, 3, tma=True)},
    "fwd": {(2, 64): _launch(128, 64, 4, 3, tma=True), (2, 128): _launch(128, 64, 8, 2, tma=True)},
    "bwd_short": {(2, 64): _launch(256, 64, 8, 3, tma=True)},
    "bwd_dq": {(2, 64): _launch(64, 64, 4, 2, tma=True), (2, 128): _launch(64, 64, 4, 2, tma=True)},
    "bwd_dkdv": {(2, 64): _launch(64, 64, 4, 2, tma=True), (2, 128): _launch(64, 64, 4, 2, tma=True)},
}


# For sm_90 and d = 64, up to 208 tokens: attention_bwd_transposed_kernel, which an entry with LAST rows names.
_TRANSPOSED = Launch({"QUERIES": 64, "KEYS": 128, "LAST": 16, "TMA": 1}, num_warps=8, num_stages=2)


def _join(table: Table, fp32: Table) -> Table:
    return {kernel: launches | fp32.get(kernel, {}) for kernel, launches in table.items()}


# The interpreter runs what sm_90 runs in 16 bit. In fp32 one large tile serves all kernels: numpy sums a product in an
# order that depends on its shape, and the backward must recompute the very scores of the forward, as the GPU does.
INTERPRETER = -1
_NUMPY = _launch(256, 256, num_warps=1, num_stages=1, tma=True)
LAUNCHES: dict[int, Table] = {
    0: _join(_POINTERS, _FP32),
    80: _join(_POINTERS, _FP32),
    90: _join(_TMA, _FP32),
    100: _join(_TMA, _FP32),
    INTERPRETER: _join(_TMA, {kernel: dict.fromkeys(launches, _NUMPY) for kernel, launches in _FP32.items()}),
}
"""Architecture -> table."""


def _columns(head_dim: int) -> int:
    """The tables' key of a head dimension: its padded width, at least 64."""
    return max(64, triton.next_power_of_2(head_dim))


def _other_entries(arch: int, kernel: str, itemsize: int, head_dim: int) -> Iterator[Launch | None]:
    """Another number of stages, loads through pointers, and the looping kernel for one of the whole sequence."""
    own = LAUNCHES[arch].get(kernel, {}).get((itemsize, _columns(head_dim)))
    if own is None or itemsize == 4:
        return
    yield replace(own, num_stages=2 if own.num_stages == 3 else own.num_stages + 1)
    yield LAUNCHES[0].get(kernel, {}).get((itemsize, _columns(head_dim)), own)
    yield from _transposed(arch, kernel, head_dim)
    if kernel.endswith("short"):
        yield None


def _transposed(arch: int, kernel: str, head_dim: int) -> Iterator[Launch]:
    if kernel == "bwd_short" and arch in (90, INTERPRETER) and head_dim == 64:
        yield _TRANSPOSED


def _all_entries(arch: int, kernel: str, itemsize: int, head_dim: int) -> Iterator[Launch | None]:
    """What a search tries."""
    if itemsize == 4:
        return
    has_tma = arch in (90, 100)
    if kernel == "fwd_short":
        for queries, warps, stages, tma in itertools.product((64, 128), (4, 8), (1, 2, 3), {has_tma, False}):
            yield _launch(queries, 0, warps, stages, tma)
    elif kernel == "bwd_short":
        for keys, warps, stages, tma in itertools.product((64, 32, 128), (8, 16, 4), (1, 2, 3), {has_tma, False}):
            yield _launch(256, keys, warps, stages, tma)
        yield from _transposed(arch, kernel, head_dim)
    else:
        sizes = (64, 128, 32)
        for queries, keys, warps, stages in itertools.product(sizes, sizes, (4, 8), (2, 3, 1)):
            yield _launch(queries, keys, warps, stages, has_tma)
    if kernel.endswith("short"):
        yield None


@tunable(_other_entries, _all_entries)
def attention_launch(arch: int, kernel: str, itemsize: int, head_dim: int) -> Launch | None:
    """The table's entry; None where this chip does not use this kernel for this dtype and head dimension."""
    return LAUNCHES[arch].get(kernel, {}).get((itemsize, _columns(head_dim)))


def _looping_launch(arch: int, kernel: str, itemsize: int, head_dim: int) -> Launch:
    entry = attention_launch(arch, kernel, itemsize, head_dim)
    assert entry is not None  # every table has the looping kernels
    return entry


def _forward_launch(arch: int, itemsize: int, head_dim: int, tokens: int) -> tuple[Any, Launch]:
    """The forward's kernel and launch."""
    short = attention_launch(arch, "fwd_short", itemsize, head_dim) if tokens in SHORT_TOKENS else None
    if short is None:
        return attention_fwd_kernel, _looping_launch(arch, "fwd", itemsize, head_dim)
    # Powers of two with the least padding: 197 keys cost 208.
    keys = (128, 64, 0) if tokens <= 192 else (128, 64, 16) if tokens <= 208 else (128, 128, 0)
    pieces = dict(zip(("KEYS1", "KEYS2", "KEYS3"), keys, strict=True))
    tiles = {name: value for name, value in short.tiles.items() if name != "KEYS"} | pieces
    return attention_fwd_short_kernel, replace(short, tiles=tiles)


def _backward_launches(arch: int, itemsize: int, head_dim: int, tokens: int) -> list[tuple[Any, Launch]]:
    """The backward's kernels and launches, in the order in which they run."""
    short = attention_launch(arch, "bwd_short", itemsize, head_dim) if tokens in SHORT_TOKENS else None
    if short is not None and "LAST" in short.tiles:
        if tokens <= 208:
            return [(attention_bwd_transposed_kernel, short)]
        short = LAUNCHES[arch]["bwd_short"][itemsize, _columns(head_dim)]
    if short is not None:
        return [(attention_bwd_short_kernel, short)]
    return [
        (attention_bwd_dq_kernel, _looping_launch(arch, "bwd_dq", itemsize, head_dim)),
        (attention_bwd_dkdv_kernel, _looping_launch(arch, "bwd_dkdv", itemsize, head_dim)),
    ]


# Launchers -----------------------------------------------------------------------------------------------------------

_BLOCK_ROWS = {
    "q": "QUERIES", "out": "QUERIES", "dout": "QUERIES", "dq": "QUERIES",
    "kv": "KEYS", "dkv": "KEYS", "kv1": "KEYS1",
}  # fmt: skip
"""Kernel argument -> the constant that gives the rows of its blocks."""

_WHOLE_HEAD = (attention_fwd_short_kernel, attention_bwd_short_kernel, attention_bwd_transposed_kernel)


def _table_key(x: Tensor) -> int:
    return INTERPRETER if INTERPRETED else architecture(x)


def _run(kernel: Any, entry: Launch, num_heads: int, head_dim: int, scale: float, tensors: dict[str, Any]) -> None:
    """Launch `kernel`, one program for each head of each sample and, unless it takes whole heads, each block of rows.

    tensors: by kernel argument, of whichever kernel; those in _BLOCK_ROWS are (B, N, heads * d), contiguous and 16-byte
        aligned.
    """
    batch, tokens, _ = tensors["q"].shape
    padded_dim = triton.next_power_of_2(head_dim)

    def tiled(name: str, tensor: Tensor) -> Tensor | TensorDescriptor:
        if not entry.tiles["TMA"]:
            return tensor
        width, block = tensor.shape[-1], [entry.tiles[_BLOCK_ROWS[name]], padded_dim]
        if padded_dim == head_dim:  # strides that rise from the inside out, as the CUDA manual has them
            return TensorDescriptor(tensor, [batch, tokens, width], [tokens * width, width, 1], [1, *block])
        shape, strides = [batch, width // head_dim, tokens, head_dim], [tokens * width, head_dim, width, 1]
        return TensorDescriptor(tensor, shape, strides, [1, 1, *block])

    taken = {name: x for name, x in tensors.items() if name in kernel.arg_names}
    arguments = {name: tiled(name, x) if name in _BLOCK_ROWS else x for name, x in taken.items()}
    scales = {"scale": scale, "scale_log2": scale * LOG2_E, "one": 1.0}
    arguments |= {name: value for name, value in scales.items() if name in kernel.arg_names}
    owned = entry.tiles["KEYS" if kernel is attention_bwd_dkdv_kernel else "QUERIES"]
    blocks = 1 if kernel in _WHOLE_HEAD else triton.cdiv(tokens, owned)
    launch(kernel, (batch * num_heads * blocks,), entry, **arguments, N=tokens, H=num_heads, D=head_dim, C=padded_dim)


def _prepared(x: Tensor) -> Tensor:
    """x itself where it is contiguous and 16-byte aligned, as the kernels need it, otherwise a copy."""
    x = x.contiguous()
    return x if on_16_bytes(x) else x.clone()


def attention_fwd(
    qkv: Tensor, num_heads: int, scale: float, arch: int | None = None, path_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """qkv (B, N, 3D) -> out (B, N, D), lse (B, H, N) fp32; `arch` overrides the chip's launch table.

    path_scale (B,) fp32, for the kernels alone: out times the factor of its sample.
    """
    if not runs_triton(qkv):
        assert path_scale is None
        return _eager_fwd(qkv, num_heads, scale)
    arch = _table_key(qkv) if arch is None else arch
    qkv = _prepared(qkv)
    batch, tokens, width = qkv.shape
    head_dim = width // 3 // num_heads
    out = qkv.new_empty(batch, tokens, width // 3)
    lse = qkv.new_empty(batch, num_heads, tokens, dtype=torch.float32)
    if qkv.numel():
        kernel, entry = _forward_launch(arch, qkv.itemsize, head_dim, tokens)
        pieces = {"kv": qkv, "kv1": qkv, "kv2": qkv, "kv3": qkv if entry.tiles.get("KEYS3") else None}
        tensors = {"q": qkv, "out": out, "lse": lse, "path_scale": path_scale} | pieces
        _run(kernel, entry, num_heads, head_dim, scale, tensors)
    return out, lse


def attention_bwd(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    scale: float,
    arch: int | None = None,
    wants_sums: bool = False,
    path_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dout (B, N, D) and what the forward took and gave -> the gradient of qkv (B, N, 3D), and parts of dq's sum.

    The parts (any number, D) fp32, None unless wanted, add up to the sum of dq over all tokens; that of dv is the sum
    of dout, since rows of p sum to 1, and that of dk is 0, since rows of ds do. So the gradient of qkv's bias needs no
    pass over the gradient of qkv.

    path_scale: as the forward had it. dout is the gradient of `out` without that factor, as of a product after which
    the factor was to follow (layernorm_attention_op.py).
    """
    if not runs_triton(qkv):
        assert path_scale is None
        return _eager_bwd(dout, qkv, out, lse, num_heads, scale)
    arch = _table_key(qkv) if arch is None else arch
    dout, qkv, out, lse = (_prepared(x) for x in (dout, qkv, out, lse))
    batch, tokens, width = out.shape
    dqkv, sums = qkv.new_empty(qkv.shape), None
    if not qkv.numel():
        return dqkv, qkv.new_zeros(1, width, dtype=torch.float32)
    launches = _backward_launches(arch, qkv.itemsize, width // num_heads, tokens)
    kernel, entry = launches[0]
    if wants_sums:
        blocks = 1 if kernel in _WHOLE_HEAD else triton.cdiv(tokens, entry.tiles["QUERIES"])
        sums = qkv.new_empty(batch * blocks, width, dtype=torch.float32)
    tensors = {"q": qkv, "kv": qkv, "out": out, "dout": dout, "lse": lse, "dq": dqkv, "dkv": dqkv, "sums": sums}
    tensors |= {"delta": torch.empty_like(lse), "path_scale": path_scale}
    if kernel is attention_bwd_transposed_kernel:
        tensors |= {"q_rows": qkv, "out_rows": out, "dout_rows": dout, "dq_rows": dqkv}
        tensors["statistics"] = lse.new_empty(batch * num_heads, 2, 4 * entry.tiles["QUERIES"])
    for kernel, entry in launches:
        _run(kernel, entry, num_heads, width // num_heads, scale, tensors)
    return dqkv, sums


# Eager implementation ------------------------------------------------------------------------------------------------


def _heads(packed: Tensor, num_heads: int) -> Tensor:
    """(B, N, H * d) -> (B, H, N, d) in fp32."""
    return packed.unflatten(-1, (num_heads, -1)).transpose(1, 2).float()


def _packed(heads: Tensor) -> Tensor:
    """The inverse of `_heads`, in fp32."""
    return heads.transpose(1, 2).flatten(2)


def _eager_fwd(qkv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    lse = qkv.new_empty(batch, num_heads, tokens, dtype=torch.float32)
    if not has_data(qkv) or not qkv.numel():
        return qkv.new_empty(batch, tokens, width // 3), lse
    q, k, v = (_heads(part, num_heads) for part in qkv.chunk(3, dim=-1))
    out, natural = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    return _packed(out).to(qkv.dtype), torch.mul(natural, LOG2_E, out=lse)


def _eager_bwd(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    if not has_data(qkv) or not qkv.numel():
        return qkv.new_empty(qkv.shape), qkv.new_zeros(1, qkv.shape[-1] // 3, dtype=torch.float32)
    q, k, v = (_heads(part, num_heads) for part in qkv.chunk(3, dim=-1))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _heads(dout, num_heads), q, k, v, _heads(out, num_heads), lse / LOG2_E, 0.0, False, scale=scale
    )
    dqkv = torch.cat([_packed(part) for part in (dq, dk, dv)], dim=-1)
    return dqkv.to(qkv.dtype), dq.sum((0, 2)).flatten()[None]


# Ops -----------------------------------------------------------------------------------------------------------------


@op("attention_fwd")
def attention_fwd_op(qkv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """qkv (B, N, 3D) -> out (B, N, D), lse (B, H, N) fp32."""
    return attention_fwd(qkv, num_heads, scale)


@op("attention_bwd")
def attention_bwd_op(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, scale: float) -> Tensor:
    """The gradient of qkv (B, N, 3D)."""
    return attention_bwd(dout, qkv, out, lse, num_heads, scale)[0]


def _setup_context(ctx: Any, inputs: tuple[Tensor, int, float], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.num_heads, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse)


def _backward(ctx: Any, dout: Tensor, _dlse: Tensor | None) -> tuple[Tensor, None, None]:
    qkv, out, lse = ctx.saved_tensors
    return attention_bwd_op(dout, qkv, out, lse, ctx.num_heads, ctx.scale), None, None


attention_fwd_op.register_autograd(_backward, setup_context=_setup_context)


def check_heads(op: str, width: int, num_heads: int, scale: float | None) -> float:
    """Raise ValueError unless heads of a supported dimension make up `width`; returns the factor of q . k."""
    choices = {width // d: d for d in HEAD_DIMS if width % d == 0}
    if num_heads not in choices:
        raise ValueError(
            f"{op}: num_heads is {num_heads}; width {width} takes {list(choices) or 'none'} "
            f"(supported head dimensions are {', '.join(map(str, HEAD_DIMS))})"
        )
    scale = choices[num_heads] ** -0.5 if scale is None else float(scale)
    if not 0.0 < scale < math.inf:
        raise ValueError(f"{op}: scale is {scale}; it must be positive and finite")
    return scale


def attention(qkv: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """Softmax attention of every token to every token: packed qkv (..., N, 3D) -> (..., N, D), same dtype.

    qkv: bfloat16, float16 or float32 (torch.autocast casts it); last dimension contiguous, [q | k | v], each
        num_heads * d channels with d one of HEAD_DIMS. Where the other dimensions are strided, it is copied once.
    scale: factor of q . k, positive; default 1 / sqrt(d).

    Raises TypeError for another dtype and ValueError for a shape, head count or scale that does not fit.
    """
    (qkv,) = autocast(qkv, qkv)
    check_dtypes("attention", qkv=qkv)
    check_last_contiguous("attention", "qkv", qkv)
    if qkv.ndim < 2:
        raise ValueError(f"attention: qkv has shape {tuple(qkv.shape)}, expected (..., tokens, 3 * width)")
    *leading, tokens, width = qkv.shape
    if width == 0 or width % 3:
        raise ValueError(f"attention: qkv has shape {tuple(qkv.shape)}; its last dimension must be a multiple of 3")
    scale = check_heads("attention", width // 3, num_heads, scale)
    out, _ = attention_fwd_op(qkv.reshape(math.prod(leading), tokens, width).contiguous(), num_heads, scale)
    return out.reshape(*leading, tokens, width // 3)
