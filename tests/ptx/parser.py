"""PTX text, as Triton's LLVM back end prints it, to statements with scoped names: no semantics here.

A kernel's body is a flat list of `Statement`s. Inner scopes (`{ ... }`, which inline assembly opens) are resolved:
their registers and labels get unique names. Operands are parsed into small tuples, see `Operand`.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import Any

Operand = tuple[Any, ...]
"""("reg", name) | ("imm", text) | ("sym", name) | ("vec", [Operand]) | ("mem", Operand, offset)
| ("tensor", Operand, [Operand]) | ("pair", Operand, Operand) | ("not", Operand) | ("sink",)"""


@dataclass
class Statement:
    """One instruction. guard: (predicate register, negated) or None."""

    opcode: str
    operands: list[Operand]
    guard: tuple[str, bool] | None
    line: int
    text: str
    location: str


@dataclass
class Kernel:
    """One kernel.

    target: 80, 90; threads: of a CTA, 0 where the PTX does not say.
    parameters: name -> (offset, bytes) in a buffer of parameter_bytes.
    registers: name -> kind ("b32", "pred"); labels: name -> index of a statement; tables: of branch targets.
    globals: name of a constant -> (alignment, contents); shared: name -> offset.
    """

    name: str
    target: int
    threads: int
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)
    parameter_bytes: int = 0
    registers: dict[str, str] = field(default_factory=dict)
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    globals: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)


class PtxError(Exception):
    """PTX that is not modelled, or a fault of the kernel that ran."""


_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
_TYPE = re.compile(r"\.(?:[busf])(8|16|32|64)$")


def parse(ptx: str) -> Kernel:
    """The one kernel of a Triton module."""
    entry = re.search(r"\.visible\s+\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", ptx, re.DOTALL)
    if entry is None:
        raise PtxError("no .visible .entry in the PTX")
    target = re.search(r"\.target\s+sm_(\d+)", ptx)
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", entry[3])
    kernel = Kernel(entry[1], int(target[1]) if target else 0, int(threads[1]) if threads else 0)
    _parameters(entry[2], kernel)
    _globals(ptx[: entry.start()], kernel)
    end = _matching_brace(ptx, entry.end())
    _Body(kernel, ptx[entry.end() : end], ptx.count("\n", 0, entry.end()) + 1).run()
    return kernel


def _matching_brace(text: str, start: int) -> int:
    depth = 1
    for match in re.compile(r"//[^\n]*|[{}]").finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    raise PtxError("a brace that nothing closes")


def _parameters(text: str, kernel: Kernel) -> None:
    offset = 0
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = re.match(r"\.param\s+(.*?)([\w$]+)(?:\[(\d+)\])?$", part, re.DOTALL)
        if match is None:
            raise PtxError(f"parameter {part!r}")
        align = re.search(r"^\s*(?:\.align\s+(\d+))", match[1])
        kind = re.search(r"\.[busf](8|16|32|64)\b", match[1])
        if kind is None:
            raise PtxError(f"parameter {part!r}")
        element = _SIZES[kind[1]]
        size = element * int(match[3] or 1)
        alignment = int(align[1]) if align else element
        offset = -(-offset // alignment) * alignment
        kernel.parameters[match[2]] = (offset, size)
        offset += size
    kernel.parameter_bytes = offset


def _globals(text: str, kernel: Kernel) -> None:
    """Module variables: constant arrays and shared memory. Dynamic shared memory begins at offset 0."""
    for line in text.splitlines():
        line = line.split("//")[0].strip()
        if match := re.match(r"(?:\.\w+\s+)*\.shared\s+.*?([\w$]+)\[(\d*)\]", line):
            if match[2] and int(match[2]):
                raise PtxError(f"static shared memory: {line}")
            kernel.shared[match[1]] = 0
        elif match := re.match(
            r"(?:\.visible\s+)?\.(?:global|const)\s+(.*?)\.[busf](8|16|32|64)\s+([\w$]+)(?:\[(\d*)\])?\s*(?:=\s*(.*?))?;",
            line,
        ):
            element, count = _SIZES[match[2]], int(match[4] or 1)
            values = [int(v, 0) for v in re.findall(r"-?\w+", (match[5] or "").strip("{} "))]
            data = b"".join((v % (1 << 8 * element)).to_bytes(element, "little") for v in values)
            kernel.globals[match[3]] = (element, data.ljust(element * count, b"\0"))


_PIECE = re.compile(r"[{};:]|[^{};:]+")


class _Body:
    """The statements of a kernel, with the scopes that are open while they are read."""

    def __init__(self, kernel: Kernel, text: str, first_line: int) -> None:
        self.kernel, self.text, self.line = kernel, text, first_line
        self.scopes: list[dict[str, str]] = [{}]
        self.pending: list[tuple[Statement, list[dict[str, str]]]] = []
        self.location = ""
        self.opened = 0

    def run(self) -> None:
        buffer, start = "", self.line
        for number, raw in enumerate(self.text.split("\n"), self.line):
            if raw.strip().startswith(".loc"):
                self.location = raw.split("//")[1].strip() if "//" in raw else ""
                continue
            for piece in _PIECE.findall(raw.split("//")[0] + "\n"):
                if not buffer.strip():
                    start = number
                    if piece in "{}":
                        self.scope(piece)
                        buffer = ""
                        continue
                if piece == ";":
                    self.statement(buffer.strip(), start)
                    buffer = ""
                elif piece == ":" and re.fullmatch(r"\s*[\w$]+", buffer):
                    self.kernel.labels[self.declare(buffer.strip())] = len(self.kernel.statements)
                    buffer = ""
                else:
                    buffer += piece
        if buffer.strip():
            raise PtxError(f"unfinished statement {buffer.strip()!r}")
        for statement, scopes in self.pending:
            statement.operands = [_resolve(operand, scopes) for operand in statement.operands]

    def scope(self, brace: str) -> None:
        if brace == "{":
            self.opened += 1
            self.scopes.append({})
        else:
            self.scopes.pop()

    def declare(self, name: str) -> str:
        unique = name if len(self.scopes) == 1 else f"{name}@{self.opened}"
        self.scopes[-1][name] = unique
        return unique

    def registers(self, text: str) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text).groups()  # type: ignore[union-attr]
        for name in map(str.strip, names.split(",")):
            if match := re.fullmatch(r"(.*)<(\d+)>", name):
                for i in range(int(match[2])):
                    self.kernel.registers[self.declare(f"{match[1]}{i}")] = kind
            else:
                self.kernel.registers[self.declare(name)] = kind

    def statement(self, text: str, line: int) -> None:
        text = " ".join(text.split())
        if text.startswith(".reg"):
            self.registers(text)
        elif text.startswith(".branchtargets"):
            name = next(name for name, at in reversed(self.kernel.labels.items()) if at == len(self.kernel.statements))
            self.kernel.tables[name] = [part.strip() for part in text.split(None, 1)[1].split(",")]
        elif not text.startswith(".pragma"):
            self.instruction(text, line)

    def instruction(self, text: str, line: int) -> None:
        match = re.match(r"(?:@(!?)([\w%$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text)
        if match is None:
            raise PtxError(f"line {line}: cannot read {text!r}")
        guard = (_find(match[2], self.scopes), bool(match[1])) if match[2] else None
        operands = [_operand(part) for part in _split(match[4])]
        statement = Statement(match[3], operands, guard, line, text, self.location)
        self.kernel.statements.append(statement)
        self.pending.append((statement, list(self.scopes)))


def _find(name: str, scopes: list[dict[str, str]]) -> str:
    for scope in reversed(scopes):
        if name in scope:
            return scope[name]
    return name


def _resolve(operand: Operand, scopes: list[dict[str, str]]) -> Operand:
    kind = operand[0]
    if kind in ("reg", "sym"):
        return (kind, _find(operand[1], scopes))
    if kind == "vec":
        return (kind, [_resolve(part, scopes) for part in operand[1]])
    if kind == "tensor":
        return (kind, _resolve(operand[1], scopes), [_resolve(part, scopes) for part in operand[2]])
    if kind in ("mem", "not"):
        return (kind, _resolve(operand[1], scopes), *operand[2:])
    if kind == "pair":
        return (kind, _resolve(operand[1], scopes), _resolve(operand[2], scopes))
    return operand


def _split(text: str) -> list[str]:
    """The parts between the commas that are in no brackets."""
    if not _BRACKET.search(text):
        return [part.strip() for part in text.split(",")] if text.strip() else []
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    if current.strip():
        parts.append(current.strip())
    return parts


_BRACKET = re.compile(r"[\[({]")
_IMMEDIATE = re.compile(r"[-+]?(?:0[xX][0-9a-fA-F]+U?|0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|\d+U?)$")


@functools.cache  # a kernel names few registers, each many times
def _operand(text: str) -> Operand:
    text = text.strip()
    if text == "_":
        return ("sink",)
    if text.startswith("{"):
        return ("vec", [_operand(part) for part in _split(text.strip()[1:-1])])
    if text.startswith("["):
        inner = text[1:-1].strip()
        parts = _split(inner)
        if len(parts) == 2 and parts[1].startswith("{"):
            return ("tensor", _operand(parts[0]), [_operand(part) for part in _split(parts[1].strip()[1:-1])])
        if len(parts) != 1:
            raise PtxError(f"address {text!r}")
        match = re.fullmatch(r"([%\w$.]+?)\s*(?:\+\s*(-?\w+))?", inner)
        if match is None:
            raise PtxError(f"address {text!r}")
        return ("mem", _operand(match[1]), int(match[2] or "0", 0))
    if text.startswith("!"):
        return ("not", _operand(text[1:]))
    if "|" in text:
        first, second = text.split("|")
        return ("pair", _operand(first), _operand(second))
    if _IMMEDIATE.match(text):
        return ("imm", text)
    if text.startswith("%") or re.fullmatch(r"[a-z]\w*", text):
        return ("reg", text)
    if re.fullmatch(r"[\w$]+", text):
        return ("sym", text)
    raise PtxError(f"operand {text!r}")
