"""PTX statements to the engine's instructions: the one place that knows what each opcode means.

An opcode that is not known raises, with its text, when its kernel is loaded; nothing is skipped.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.ptx.binding import INSN, READ, SHARED_BASE, SIGNED, SPECIALS, TRANS, TRANS_B, WIDE, operations
from tests.ptx.parser import Kernel, Operand, PtxError, Statement

GLOBAL, SHARED = 0, 1
_SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z")
_ALWAYS = {"%ntid.y": 1, "%ntid.z": 1, "%tid.y": 0, "%tid.z": 0, "%cluster_ctarank": 0, "%cluster_ctaid.x": 0}
"""Special registers whose value is known: CTAs are one-dimensional and form no clusters."""
_MASK32, _MASK64 = (1 << 32) - 1, (1 << 64) - 1
_ORDER = {"relaxed", "acquire", "release", "acq_rel", "weak", "volatile", "gpu", "cta", "sys"}
_CACHE = {"nc", "ca", "cg", "cs", "cv", "wb", "wt", "lu", "L2::cache_hint"} | {
    f"L1::{policy}" for policy in ("evict_last", "evict_first", "evict_normal", "no_allocate")
}
"""Suffixes of loads and stores that say nothing to a machine which runs one warp at a time without caches."""
_ATOMICS = ("add", "min_s", "max_s", "min_u", "max_u", "and", "or", "xor", "exch", "cas", "add_f32")

Row = dict[str, Any]
"""Fields of an instruction by name: op, o (operands), n, size, kind, flags, imm, ext, see engine/machine.h."""


@dataclass
class Program:
    """What the engine runs. keep holds memory that the code points to, first the buffer at address `parameters`."""

    kernel: Kernel
    code: np.ndarray
    pool: np.ndarray
    image: np.ndarray
    slots: int
    predicates: int
    special: list[int]
    statements: dict[int, Statement]
    parameters: int
    keep: list[ctypes.Array]


def assemble(kernel: Kernel) -> Program:
    """Encode all of a kernel's statements."""
    return _Assembler(kernel).run()


class _Assembler:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.ops = kernel, operations()
        self.slots: dict[str, int] = {}
        self.predicates: dict[str, int] = {}
        self.wide: set[str] = set()
        self.next_slot = 0
        self.constants: dict[tuple[int, int], int] = {}
        self.special = [-1] * SPECIALS
        self.pool: list[int] = []
        self.touched: list[int] = []
        buffer = (ctypes.c_uint8 * (kernel.parameter_bytes + 256))()
        self.parameters = -(-ctypes.addressof(buffer) // 128) * 128
        self.keep: list[ctypes.Array] = [buffer]
        self.global_address: dict[str, int] = {}
        for name, kind in kernel.registers.items():
            if kind == "pred":
                self.predicates[name] = len(self.predicates)
                continue
            self.slots[name] = self.next_slot
            if kind.endswith("64"):
                self.wide.add(name)
            self.next_slot += 2 if name in self.wide else 1
        for name, (align, data) in kernel.globals.items():
            constant = ctypes.create_string_buffer(data, len(data) + 16)
            self.keep.append(constant)
            self.global_address[name] = -(-ctypes.addressof(constant) // align) * align

    def run(self) -> Program:
        rows = [self.encode_or_say_where(statement) for statement in self.kernel.statements]
        code = np.zeros(len(rows) + 1, INSN)
        for name in INSN.names or ():
            code[name][:-1] = [row.get(name, 0) for row in rows]
        code[len(rows)]["op"], code[len(rows)]["pred"] = self.ops["trap"], -1
        image = np.full((self.next_slot + 1, 32), _MASK32, np.uint32)
        for (value, width), slot in self.constants.items():
            if width == 64:
                image[slot : slot + 2].reshape(-1).view(np.uint64)[:] = np.uint64(value)
            else:
                image[slot] = value
        return Program(
            self.kernel, code, np.array(self.pool or [0], np.int32), image, self.next_slot + 1,
            len(self.predicates) + 1, self.special, {s.line: s for s in self.kernel.statements}, self.parameters,
            self.keep,
        )  # fmt: skip

    def encode_or_say_where(self, s: Statement) -> Row:
        where = f"{self.kernel.name}, PTX line {s.line}"
        try:
            return self.encode(s)
        except PtxError as error:
            raise PtxError(f"{where}: {s.text}: {error}") from None
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise PtxError(f"{where}: {s.text}: not modelled ({error!r})") from error

    def encode(self, s: Statement) -> Row:
        self.touched = []
        parts = s.opcode.split(".")
        handler: Callable[[Statement, list[str]], Row] = getattr(self, "op_" + parts[0], self.simple)
        row = {"pred": -1, "line": s.line} | handler(s, parts)
        if s.guard is not None:
            row |= {"pred": self.predicates[s.guard[0]], "negate": int(s.guard[1])}
        operands = list(row.get("o", ()))
        uses = list(dict.fromkeys(self.touched))
        row |= {"op": self.ops[row["op"]], "o": operands + [-1] * (6 - len(operands))}
        return row | {"uses": self.extend(uses), "nuses": len(uses)}

    # Operands ---------------------------------------------------------------------------------------------------------

    def constant(self, value: int, width: int) -> int:
        value &= _MASK64 if width == 64 else _MASK32
        if (value, width) not in self.constants:
            self.constants[value, width] = self.next_slot
            self.next_slot += 2 if width == 64 else 1
        return self.constants[value, width]

    def value(self, operand: Operand, width: int) -> int:
        """The slot of a register, special register, immediate or address of `width` bits (16 counts as 32)."""
        if operand[0] == "imm":
            return self.constant(_number(operand[1], width), width)
        if operand[0] not in ("sym", "reg"):
            raise PtxError(f"operand {operand}")
        name = operand[1]
        if name in self.slots:
            if (name in self.wide) != (width == 64):
                raise PtxError(f"{name} where a register of {width} bits belongs")
            self.touched.append(self.slots[name])
            return self.slots[name]
        if name in _SPECIAL and width != 64:
            index = _SPECIAL.index(name)
            if self.special[index] < 0:
                self.special[index], self.next_slot = self.next_slot, self.next_slot + 1
            return self.special[index]
        if name in _ALWAYS and width != 64:
            return self.constant(_ALWAYS[name], width)
        if name in self.kernel.shared:
            return self.constant(SHARED_BASE + self.kernel.shared[name], width)
        if name in self.global_address and width == 64:
            return self.constant(self.global_address[name], 64)
        if name in self.kernel.parameters and width == 64:
            return self.constant(self.parameters + self.kernel.parameters[name][0], 64)
        raise PtxError(f"operand {operand}")

    def predicate(self, operand: Operand) -> int:
        if operand[0] in ("reg", "sym") and operand[1] in self.predicates:
            return self.predicates[operand[1]]
        raise PtxError(f"operand {operand} where a predicate belongs")

    def values(self, operand: Operand, width: int) -> list[int]:
        return [self.value(part, width) for part in (operand[1] if operand[0] == "vec" else [operand])]

    def extend(self, values: list[int]) -> int:
        self.pool += values
        return len(self.pool) - len(values)

    def address(self, operand: Operand, space: int) -> tuple[int, int]:
        """Slot and offset."""
        if operand[0] != "mem":
            raise PtxError(f"operand {operand} where an address belongs")
        return self.value(operand[1], 32 if space == SHARED else 64), operand[2]

    # Registers --------------------------------------------------------------------------------------------------------

    def plain(self, name: str, widths: str, s: Statement, **more: Any) -> Row:
        """An operation on registers: one letter an operand, w 32 bits, q 64, h 16, p predicate."""
        if len(widths) != len(s.operands):
            raise PtxError(f"{len(s.operands)} operands instead of {len(widths)}")
        slots = [
            self.predicate(operand) if width == "p" else self.value(operand, {"w": 32, "q": 64, "h": 16}[width])
            for width, operand in zip(widths, s.operands, strict=True)
        ]
        return {"op": name, "o": slots, **more}

    def simple(self, s: Statement, parts: list[str]) -> Row:
        return self.plain(*_simple(s.opcode), s)

    def op_mov(self, s: Statement, parts: list[str]) -> Row:
        d, a = s.operands
        if parts[-1] == "pred":
            if a[0] == "imm":
                return {"op": "setp_ne_u32", "o": [self.predicate(d), -1, self.value(a, 32), self.constant(0, 32)]}
            return {"op": "mov_pred", "o": [self.predicate(d), self.predicate(a)]}
        bits = _bits(parts[-1])
        width = 64 if bits == 64 else 32
        flags = WIDE if width == 64 else 0
        if d[0] != "vec" and a[0] != "vec":
            return {"op": f"mov_{width}", "o": [self.value(d, width), self.value(a, bits)]}
        op, whole, vector = ("pack", d, a[1]) if a[0] == "vec" else ("unpack", a, d[1])
        part = bits // len(vector)
        pieces = [-1 if x[0] == "sink" else self.value(x, min(part, 32)) for x in vector]
        return {
            "op": op, "o": [self.value(whole, width)], "n": len(vector), "size": part // 8, "flags": flags,
            "ext": self.extend(pieces),
        }  # fmt: skip

    def op_cvta(self, s: Statement, parts: list[str]) -> Row:
        if s.opcode not in ("cvta.param.u64", "cvta.global.u64", "cvta.to.global.u64"):
            raise PtxError("not modelled")
        return self.plain("mov_64", "qq", s)

    def op_setp(self, s: Statement, parts: list[str]) -> Row:
        parts = [part for part in parts if part != "ftz"]
        compare = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(parts[1], parts[1])
        kind = parts[-1].replace("b", "u")
        d, *operands = s.operands
        first, second = (d[1], d[2]) if d[0] == "pair" else (d, ("sink",))
        slots = [self.predicate(first), -1 if second[0] == "sink" else self.predicate(second)]
        slots += [self.value(x, _bits(kind)) for x in operands[:2]]
        row: Row = {"op": f"setp_{compare}_{kind}"}
        if len(parts) == 4:
            negated = operands[2][0] == "not"
            slots.append(self.predicate(operands[2][1] if negated else operands[2]))
            row |= {"kind": ("and", "or", "xor").index(parts[2]) + 1, "flags": TRANS if negated else 0}
        return row | {"o": slots}

    def op_selp(self, s: Statement, parts: list[str]) -> Row:
        bits = _bits(parts[1])
        return self.plain(f"selp_{64 if bits == 64 else 32}", {64: "q", 16: "h"}.get(bits, "w") * 3 + "p", s)

    def op_lop3(self, s: Statement, parts: list[str]) -> Row:
        return {"op": "lop3", "o": [self.value(x, 32) for x in s.operands[:4]], "imm": _number(s.operands[4][1], 32)}

    def op_cvt(self, s: Statement, parts: list[str]) -> Row:
        modifiers, to, source = set(parts[1:-2]) - {"ftz"}, parts[-2], parts[-1]
        if modifiers - {"rn", "rni", "rzi", "rmi", "rpi"}:
            raise PtxError("not modelled")
        rounding = next(iter(modifiers), "")
        mode = {"rzi": 1, "rmi": 2, "rpi": 3}.get(rounding, 0)
        floats = ("f32", "f64", "f16", "bf16")
        if to.endswith("x2"):
            return self.plain(f"cvt_{to}_{source}", "www", s)
        if to == source and to in ("f32", "f64"):
            name = "round_ftz_f32" if ".ftz" in s.opcode else f"round_{to}"
            return self.plain(name, "qq" if to == "f64" else "ww", s, kind=mode)
        if to not in floats and source not in floats:
            return self.between_integers(s, to, source)
        if to in floats and rounding not in ("", "rn"):
            raise PtxError("not modelled")
        return self.plain(f"cvt_{to}_{source}", self.width(s, to, 0) + self.width(s, source, 1), s, kind=mode)

    def between_integers(self, s: Statement, to: str, source: str) -> Row:
        """The source's signedness says how to widen, the target's size how to narrow."""
        to_bits, from_bits = _bits(to), _bits(source)
        widths = self.width(s, to, 0) + self.width(s, source, 1)
        if to_bits == from_bits:
            return self.plain("mov_64" if to_bits == 64 else "mov_32", widths, s)
        if to_bits < from_bits:
            name = "cvt_s8_u32" if to == "s8" else f"cvt_u{to_bits}_u{max(from_bits, 32)}"
        elif to_bits == 64:
            name = f"cvt_{source[0]}64_{source}"
        elif source[0] == "s":
            name = {(16, 8): "cvt_s16_s8", (32, 8): "cvt_s8_u32", (32, 16): "cvt_u32_s16"}[to_bits, from_bits]
        else:
            name = f"cvt_u{from_bits}_u32"
        return self.plain(name, widths, s)

    def width(self, s: Statement, kind: str, index: int) -> str:
        """The width letter of an operand; an integer may sit in a register that is wider than its type."""
        operand = s.operands[index]
        in_wide = operand[0] in ("reg", "sym") and operand[1] in self.wide and kind[0] in "us"
        return "q" if in_wide or kind.endswith("64") else "h" if kind.endswith("16") and operand[0] == "imm" else "w"

    # Control ----------------------------------------------------------------------------------------------------------

    def op_bra(self, s: Statement, parts: list[str]) -> Row:
        return {"op": "bra", "o": [self.kernel.labels[s.operands[0][1]]]}

    def op_brx(self, s: Statement, parts: list[str]) -> Row:
        targets = [self.kernel.labels[name] for name in self.kernel.tables[s.operands[1][1]]]
        return {"op": "brx", "o": [self.value(s.operands[0], 32)], "n": len(targets), "ext": self.extend(targets)}

    def op_ret(self, s: Statement, parts: list[str]) -> Row:
        return {"op": "ret"}

    def op_trap(self, s: Statement, parts: list[str]) -> Row:
        return {"op": "trap"}

    def op_bar(self, s: Statement, parts: list[str]) -> Row:
        if s.opcode == "bar.warp.sync":
            return {"op": "bar_warp", "o": [self.value(s.operands[0], 32)]}
        if set(parts[1:]) - {"sync", "cta", "aligned"}:
            raise PtxError("not modelled")
        return {"op": "bar_sync", "o": [self.value(x, 32) for x in s.operands]}

    op_exit, op_barrier = op_ret, op_bar

    def op_fence(self, s: Statement, parts: list[str]) -> Row:
        return {"op": "fence_proxy" if s.opcode.startswith("fence.proxy.async") else "nop"}

    def op_nop(self, s: Statement, parts: list[str]) -> Row:
        return {"op": "nop"}

    op_membar = op_griddepcontrol = op_setmaxnreg = op_prefetch = op_nop

    # Memory -----------------------------------------------------------------------------------------------------------

    def op_ld(self, s: Statement, parts: list[str]) -> Row:
        signed = SIGNED if parts[-1][0] == "s" else 0
        if parts[1] != "param":
            return self.memory("ld", parts, s.operands[0], s.operands[1], signed)
        target, source = s.operands
        wide = WIDE if target[1] in self.wide else 0
        offset = self.kernel.parameters[source[1][1]][0] + source[2]
        slot = self.value(target, 64 if wide else 32)
        return {"op": "ld_param", "o": [slot, offset], "size": _bits(parts[-1]) // 8, "flags": wide | signed}

    def op_st(self, s: Statement, parts: list[str]) -> Row:
        return self.memory("st", parts, s.operands[1], s.operands[0], 0)

    def memory(self, op: str, parts: list[str], data: Operand, mem: Operand, signed: int) -> Row:
        space, bits = _space(parts), _bits(parts[-1])
        count = next((int(p[1:]) for p in parts if re.fullmatch(r"v[248]", p)), 1)
        known = {op, "global", "shared", "shared::cta", f"v{count}", parts[-1]}
        items = data[1] if data[0] == "vec" else [data]
        if set(parts) - known - _ORDER - _CACHE or len(items) != count:
            raise PtxError("not modelled")
        wide = WIDE if any(x[0] != "imm" and x[1] in self.wide for x in items) else 0
        wide = WIDE if bits == 64 and all(x[0] == "imm" for x in items) else wide
        values = [self.value(x, 64 if wide else min(bits, 32) if x[0] == "imm" else 32) for x in items]
        slot, offset = self.address(mem, space)
        return {
            "op": op, "o": [slot, space], "imm": offset, "n": count, "size": bits // 8, "flags": wide | signed,
            "ext": self.extend(values),
        }  # fmt: skip

    def op_atom(self, s: Statement, parts: list[str]) -> Row:
        space, kind = _space(parts), parts[-1]
        operation = next(p for p in parts if p in ("add", "min", "max", "and", "or", "xor", "exch", "cas"))
        known = {"atom", "red", "global", "shared", "shared::cta", operation, kind}
        if set(parts) - known - _ORDER or _bits(kind) != 32 or kind.endswith("x2"):
            raise PtxError("not modelled")
        if operation in ("min", "max"):
            operation += "_s" if kind[0] == "s" else "_u"
        elif kind == "f32":
            operation += "_f32"
        result, mem, *data = s.operands if parts[0] == "atom" else [("sink",), *s.operands]
        slot, offset = self.address(mem, space)
        operands = [self.value(x[1][0] if x[0] == "vec" else x, 32) for x in data]
        target = -1 if result[0] == "sink" else self.value(result, 32)
        return {"op": "atom", "o": [target, slot, space, *operands], "imm": offset, "kind": _ATOMICS.index(operation)}

    op_red = op_atom

    def op_cp(self, s: Statement, parts: list[str]) -> Row:
        name = s.opcode
        if name.startswith("cp.async.bulk.tensor."):
            return self.bulk_tensor(s, parts)
        waits = {
            "cp.async.bulk.wait_group.read": ("bulk_wait", READ),
            "cp.async.bulk.wait_group": ("bulk_wait", 0),
            "cp.async.wait_group": ("cp_async_wait", 0),
        }
        if name in waits:
            op, flags = waits[name]
            return {"op": op, "imm": _number(s.operands[0][1], 32), "flags": flags}
        if name in ("cp.async.bulk.commit_group", "cp.async.commit_group"):
            return {"op": "bulk_commit" if "bulk" in name else "cp_async_commit"}
        if not re.fullmatch(r"cp\.async\.c[ag]\.shared(?:::cta)?\.global", name):
            raise PtxError("not modelled")
        to, to_offset = self.address(s.operands[0], SHARED)
        source, source_offset = self.address(s.operands[1], GLOBAL)
        size = self.value(s.operands[3], 32) if len(s.operands) == 4 else -1
        return {
            "op": "cp_async", "o": [to, source, size], "imm": to_offset, "size": _number(s.operands[2][1], 32),
            "ext": self.extend([source_offset]),
        }  # fmt: skip

    def bulk_tensor(self, s: Statement, parts: list[str]) -> Row:
        path = [part for part in parts[5:] if part != "tile"]
        if path in ([f"shared::{kind}", "global", "mbarrier::complete_tx::bytes"] for kind in ("cta", "cluster")):
            mem, tensor, barrier = s.operands
            slot, offset = self.address(mem, SHARED)
            bar, bar_offset = self.address(barrier, SHARED)
            if bar_offset:
                raise PtxError("offset of an mbarrier")
            row: Row = {"op": "tma_load", "o": [slot, self.value(tensor[1], 64), bar]}
        elif path == ["global", "shared::cta", "bulk_group"]:
            tensor, mem = s.operands
            slot, offset = self.address(mem, SHARED)
            row = {"op": "tma_store", "o": [self.value(tensor[1], 64), slot]}
        else:
            raise PtxError("not modelled")
        coordinates = [self.value(c, 32) for c in tensor[2]]
        return row | {"imm": offset, "n": int(parts[4][0]), "ext": self.extend(coordinates)}

    def op_mbarrier(self, s: Statement, parts: list[str]) -> Row:
        name = re.sub(r"\.shared(::cta)?|\.b64|\.release|\.acquire|\.relaxed|\.cta\b", "", s.opcode)
        kinds = {
            "mbarrier.init": 0, "mbarrier.inval": 1, "mbarrier.arrive": 2, "mbarrier.expect_tx": 3,
            "mbarrier.arrive.expect_tx": 4, "mbarrier.try_wait.parity": 5, "mbarrier.test_wait.parity": 5,
        }  # fmt: skip
        kind, operands = kinds[name], list(s.operands)
        result = operands.pop(0) if kind in (2, 4, 5) else ("sink",)
        if kind in (2, 4) and result[0] != "sink":
            raise PtxError("not modelled: the state of an mbarrier")
        slot, offset = self.address(operands[0], SHARED)
        count = self.value(operands[1], 32) if len(operands) > 1 else -1
        done = self.predicate(result) if kind == 5 else -1
        return {"op": "mbarrier", "o": [slot, count, done], "imm": offset, "kind": kind}

    # Tensor cores -----------------------------------------------------------------------------------------------------

    def op_ldmatrix(self, s: Statement, parts: list[str]) -> Row:
        match = re.fullmatch(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16", s.opcode)
        if match is None:
            raise PtxError("not modelled")
        data, mem = s.operands if match[1] == "ld" else s.operands[::-1]
        slot, offset = self.address(mem, SHARED)
        values = self.values(data, 32)
        if len(values) != int(match[2]):
            raise PtxError(f"{len(values)} registers")
        return {
            "op": f"{match[1]}matrix", "o": [slot], "imm": offset, "n": len(values), "flags": TRANS if match[3] else 0,
            "ext": self.extend(values),
        }  # fmt: skip

    op_stmatrix = op_ldmatrix

    def op_mma(self, s: Statement, parts: list[str]) -> Row:
        match = re.fullmatch(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(f16|bf16)\.\1\.f32", s.opcode)
        values = [self.values(x, 32) for x in s.operands]
        if match is None or [len(x) for x in values] != [4, 4, 2, 4]:
            raise PtxError("not modelled")
        kind = ("f16", "bf16").index(match[1])
        return {"op": "mma_sync", "kind": kind, "ext": self.extend([slot for part in values for slot in part])}

    def op_wgmma(self, s: Statement, parts: list[str]) -> Row:
        if parts[1] in ("fence", "commit_group", "wait_group"):
            count = _number(s.operands[0][1], 32) if s.operands else 0
            op = {"fence": "nop", "commit_group": "wgmma_commit", "wait_group": "wgmma_wait"}[parts[1]]
            return {"op": op, "imm": count}
        match = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(f16|bf16)\.\2", s.opcode)
        d, a, b, scale, *rest = s.operands
        accumulators = self.values(d, 32)
        numbers = [_number(x[1], 32) for x in rest]
        if match is None or len(accumulators) != int(match[1]) // 2 or numbers[:2] != [1, 1]:
            raise PtxError("not modelled")
        registers = self.values(a, 32) if a[0] == "vec" else []
        trans_a, trans_b = ([0] if registers else []) + numbers[2:]
        row: Row = {"kind": int(_number(scale[1], 32) != 0)} if scale[0] == "imm" else {}
        predicate = -1 if row else self.predicate(scale)
        kind = ("f16", "bf16").index(match[2])
        return row | {
            "op": "wgmma", "o": [kind, -1 if registers else self.value(a, 64), self.value(b, 64), predicate],
            "n": int(match[1]), "flags": TRANS * trans_a | TRANS_B * trans_b,
            "ext": self.extend(accumulators + registers),
        }  # fmt: skip

    # Within a warp ----------------------------------------------------------------------------------------------------

    def op_shfl(self, s: Statement, parts: list[str]) -> Row:
        d, *operands = s.operands
        if parts[1] != "sync" or parts[3] != "b32":
            raise PtxError("not modelled")
        target, valid = (d[1], self.predicate(d[2])) if d[0] == "pair" else (d, -1)
        slots = [self.value(x, 32) for x in (target, *operands)]
        return {"op": "shfl", "o": [*slots, valid], "kind": ("up", "down", "bfly", "idx").index(parts[2])}

    def op_vote(self, s: Statement, parts: list[str]) -> Row:
        kind = ("ballot", "all", "any").index(parts[2])
        d, p, members = s.operands
        negated = p[0] == "not"
        target = self.predicate(d) if kind else self.value(d, 32)
        source = self.predicate(p[1] if negated else p)
        flags = TRANS if negated else 0
        return {"op": "vote", "o": [target, source, self.value(members, 32)], "kind": kind, "flags": flags}

    def op_redux(self, s: Statement, parts: list[str]) -> Row:
        name = f"{parts[2]}_{parts[3][0]}" if parts[2] in ("min", "max") else parts[2]
        return self.plain("redux", "www", s, kind=_ATOMICS.index(name))

    def op_elect(self, s: Statement, parts: list[str]) -> Row:
        (_, target, leader), members = s.operands
        slot = -1 if target[0] == "sink" else self.value(target, 32)
        return {"op": "elect", "o": [slot, self.predicate(leader), self.value(members, 32)]}


@functools.cache
def _simple(opcode: str) -> tuple[str, str]:
    """The engine's name and the operands' widths of an operation on registers alone."""
    for pattern, name, widths in _SIMPLE:
        if match := re.fullmatch(pattern, opcode):
            return match.expand(name).replace(".", "_"), widths
    raise PtxError("not modelled")


@functools.cache
def _bits(kind: str) -> int:
    return int(re.sub(r"\D", "", kind.removesuffix("x2")))


def _space(parts: list[str]) -> int:
    if "global" in parts:
        return GLOBAL
    if "shared" in parts or "shared::cta" in parts:
        return SHARED
    raise PtxError("not modelled: local memory or a generic address")


def _number(text: str, width: int) -> int:
    """Bits of an immediate."""
    lower = text.lower()
    if lower.startswith(("0f", "0d")):
        return int(lower[2:], 16)
    return int(lower.rstrip("u"), 0) & ((1 << width) - 1)


_SIMPLE: list[tuple[str, str, str]] = [
    (r"(and|or|xor)\.pred", r"\1_pred", "ppp"),
    (r"not\.pred", "not_pred", "pp"),
    (r"(and|or|xor)\.b16", r"\1_32", "hhh"),
    (r"(and|or|xor)\.b(32)", r"\1_\2", "www"),
    (r"(and|or|xor)\.b(64)", r"\1_\2", "qqq"),
    (r"not\.b32", "not_32", "ww"),
    (r"(add|sub|mul\.lo)\.[su]16", r"\1_16", "hhh"),
    (r"(add|sub|mul\.lo)\.[su]32", r"\1_32", "www"),
    (r"(add|sub|mul\.lo)\.[su]64", r"\1_64", "qqq"),
    (r"mul\.hi\.(u16)", r"mul_hi_\1", "hhh"),
    (r"mul\.hi\.([su]32)", r"mul_hi_\1", "www"),
    (r"mul\.hi\.(u64)", r"mul_hi_\1", "qqq"),
    (r"mul\.wide\.(u16)", r"mul_wide_\1", "whh"),
    (r"mul\.wide\.([su]32)", r"mul_wide_\1", "qww"),
    (r"mad\.lo\.[su]32", "mad_lo_32", "wwww"),
    (r"mad\.lo\.[su]64", "mad_lo_64", "qqqq"),
    (r"mad\.wide\.(u16)", r"mad_wide_\1", "whhw"),
    (r"mad\.wide\.([su]32)", r"mad_wide_\1", "qwwq"),
    (r"(div|rem|min|max)\.([su]32)", r"\1_\2", "www"),
    (r"(div|rem)\.([su]64)", r"\1_\2", "qqq"),
    (r"(min|max)\.(s64)", r"\1_\2", "qqq"),
    (r"(neg|abs)\.(s32)", r"\1_\2", "ww"),
    (r"shl\.b(16)", r"shl_\1", "hhw"),
    (r"shl\.b(32)", r"shl_\1", "www"),
    (r"shl\.b(64)", r"shl_\1", "qqw"),
    (r"shr\.[bu](16|32)", r"shr_u\1", "www"),
    (r"shr\.[bu]64", "shr_u64", "qqw"),
    (r"shr\.(s32)", r"shr_\1", "www"),
    (r"shr\.(s64)", r"shr_\1", "qqw"),
    (r"shf\.([lr])\.wrap\.b32", r"shf_\1_wrap", "wwww"),
    (r"bfe\.([su]32)", r"bfe_\1", "wwww"),
    (r"prmt\.b32", "prmt", "wwww"),
    (r"(popc|clz)\.b32", r"\1_32", "ww"),
    (r"(add|sub|mul)(?:\.rn)?\.f32", r"\1_f32", "www"),
    (r"(add|sub|mul)(?:\.rn)?\.ftz\.f32", r"\1_ftz_f32", "www"),
    (r"fma\.rn\.f32", "fma_f32", "wwww"),
    (r"fma\.rn\.ftz\.f32", "fma_ftz_f32", "wwww"),
    (r"div\.(?:full|rn|approx)\.f32", "div_f32", "www"),
    (r"div\.(?:full|rn|approx)\.ftz\.f32", "div_ftz_f32", "www"),
    (r"(rcp|sqrt|rsqrt|ex2|lg2)\.(?:rn|approx)\.f32", r"\1_f32", "ww"),
    (r"(rcp|sqrt|rsqrt|ex2|lg2)\.(?:rn|approx)\.ftz\.f32", r"\1_ftz_f32", "ww"),
    (r"(neg|abs)\.f32", r"\1_f32", "ww"),
    (r"(neg|abs)\.ftz\.f32", r"\1_ftz_f32", "ww"),
    (r"(min|max)\.f32", r"\1_f32", "www"),
    (r"(min|max)\.NaN\.f32", r"\1_nan_f32", "www"),
    (r"(add|sub|mul|div)(?:\.rn)?\.f64", r"\1_f64", "qqq"),
    (r"(min|max)\.f64", r"\1_f64", "qqq"),
    (r"fma\.rn\.f64", "fma_f64", "qqqq"),
    (r"neg\.f64", "neg_f64", "qq"),
    (r"(add|sub|mul)(?:\.rn)?\.(b?f16(?:x2)?)", r"\1_\2", "www"),
    (r"(min|max)\.(b?f16(?:x2)?)", r"\1_\2", "www"),
    (r"fma\.rn\.(b?f16(?:x2)?)", r"fma_\1", "wwww"),
]
"""Opcodes on registers alone: pattern, the engine's name, width of each operand."""
