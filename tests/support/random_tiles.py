"""Random tile programs as kernel text, for hypothesis: every statement keeps track of shapes and dtypes.

The kernel reads ``x`` (float32, 50 x 70), ``h`` (float16, 70 x 66), ``n`` (int32, 90) and writes ``f`` (float32),
``i`` (int32) and ``c`` (int32, by atomic updates). Integer parts are exact on every machine; float parts are not,
so a program may be drawn with ``exact``, which keeps to integers.
"""

from __future__ import annotations

import itertools
import linecache
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st

import tilewright as tw
from tilewright.frontend.definition import KernelDefinition

SHAPES = ((16, 32), (32, 16), (64, 4), (48, 16), (16, 1), (1, 32), (32,), (64,), (96,))
GRID = (2, 2)
FILES = itertools.count()
HEAD = "def program(x: tw.Tensor, h: tw.Tensor, n: tw.Tensor, f: tw.Tensor, i: tw.Tensor, c: tw.Tensor):"
PARAMETERS = {"x": ("f32", 2), "h": ("f16", 2), "n": ("i32", 1), "f": ("f32", 5), "i": ("i32", 5), "c": ("i32", 1)}


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(11)
    return {
        "x": rng.standard_normal((50, 70)).astype(np.float32),
        "h": rng.standard_normal((70, 66)).astype(np.float16),
        "n": rng.integers(-40, 100, 90).astype(np.int32),
        "f": np.zeros((3, *GRID, 64, 128), np.float32),
        "i": np.zeros((3, *GRID, 64, 128), np.int32),
        "c": np.zeros(64, np.int32),
    }


@dataclass
class Tile:
    name: str
    dtype: str  # "f32" or "i32"
    shape: tuple[int, ...]


@dataclass
class Program:
    """A program under construction. ``draw`` is hypothesis's."""

    draw: Any
    exact: bool
    with_dots: bool
    lines: list[str] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)
    scalars: list[str] = field(default_factory=lambda: ["0", "1", "p", "q"])
    indent: int = 1
    count: int = 0

    def pick(self, items: Any) -> Any:
        return self.draw(st.sampled_from(list(items)))

    def emit(self, line: str) -> None:
        self.lines.append("    " * self.indent + line)

    def new(self, text: str, dtype: str, shape: tuple[int, ...]) -> Tile:
        self.count += 1
        tile = Tile(f"v{self.count}", dtype, shape)
        self.emit(f"{tile.name} = {text}")
        self.tiles.append(tile)
        return tile

    def tile(self, dtype: str | None = None, shape: tuple[int, ...] | None = None) -> Tile:
        """A tile of the program, made to fit."""
        fitting = [t for t in self.tiles if dtype in (None, t.dtype) and shape in (None, t.shape)]
        if fitting:
            return self.pick(fitting)
        return self.load(dtype, shape)

    def dtype(self) -> str:
        return "i32" if self.exact else self.pick(("f32", "i32"))

    # --- statements ---------------------------------------------------------------------------

    def load(self, dtype: str | None = None, shape: tuple[int, ...] | None = None) -> Tile:
        dtype, shape = dtype or self.dtype(), shape or self.pick(SHAPES)
        if dtype == "f32":
            rows = (1, *shape) if len(shape) == 1 else shape
            text = f"tw.load(x, ({self.pick(self.scalars)}, {self.pick(self.scalars)}), {rows}, pad=2.5)"
            return self.new(text if rows == shape else f"{text}.reshape{shape}", dtype, shape)
        size = int(np.prod(shape))
        text = f"tw.load(n, {self.pick(self.scalars)}, {size}, pad=-3)"
        return self.new(text if len(shape) == 1 else f"{text}.reshape({shape})", dtype, shape)

    def binary(self) -> None:
        a = self.tile()
        b = self.tile(a.dtype, a.shape)
        forms = "{a} + {b};{a} - {b};{a} * {b};tw.maximum({a}, {b});tw.minimum({a}, {b});-{a};tw.abs({a})".split(";")
        forms.append("tw.where({a} < {b}, {a}, {b})")
        if a.dtype == "i32":
            forms += "{a} & {b};{a} ^ {b};{a} | 5;{a} >> 2;{a} << 1;{a} // 3;{a} % 7;~{a}".split(";")
            forms.append("({a} == {b}).to(tw.int32)")
        self.new(self.pick(forms).format(a=a.name, b=b.name), a.dtype, a.shape)

    def cast(self) -> None:
        a = self.tile()
        if self.exact or a.dtype == "i32":
            narrow = self.pick(("int8", "int16", "int64")) if self.exact else self.pick(("int8", "float32"))
            if narrow == "float32":
                self.new(f"{a.name}.to(tw.float32)", "f32", a.shape)
            else:
                self.new(f"{a.name}.to(tw.{narrow}).to(tw.int32)", "i32", a.shape)
        else:
            kind = self.pick(("float16", "bfloat16", "float8_e4m3", "int32"))
            text = f"{a.name}.to(tw.{kind})"
            self.new(
                text if kind == "int32" else f"{text}.to(tw.float32)", "i32" if kind == "int32" else "f32", a.shape
            )

    def reduce(self) -> None:
        a = self.tile()
        axis = self.draw(st.integers(0, len(a.shape) - 1))
        fn = self.pick(("sum", "max", "min", "argmax", "argmin"))
        dtype = "i32" if fn.startswith("arg") else a.dtype
        if len(a.shape) == 1:
            self.new(f"tw.full({a.shape}, tw.{fn}({a.name}))", dtype, a.shape)
        else:
            keep = self.draw(st.booleans())
            shape = tuple(1 if n == axis else s for n, s in enumerate(a.shape))
            left = shape if keep else tuple(s for n, s in enumerate(a.shape) if n != axis)
            self.new(f"tw.{fn}({a.name}, axis={axis}, keepdims={keep})", dtype, left)

    def spread(self) -> None:
        """A reduction meets its source again."""
        a = self.tile()
        if len(a.shape) == 2:
            axis = self.draw(st.integers(0, 1))
            self.new(f"{a.name} - tw.max({a.name}, axis={axis}, keepdims=True)", a.dtype, a.shape)

    def scan(self) -> None:
        a = self.tile()
        self.new(f"tw.cumsum({a.name}, {self.draw(st.integers(0, len(a.shape) - 1))})", a.dtype, a.shape)

    def reshape(self) -> None:
        a = self.tile()
        if len(a.shape) == 2:
            if self.draw(st.booleans()):
                self.new(f"{a.name}.T", a.dtype, (a.shape[1], a.shape[0]))
            elif a.shape[0] % 2 == 0:
                half = a.shape[0] // 2
                self.new(f"{a.name}[{self.pick((0, half))}:][:{half}]", a.dtype, (half, a.shape[1]))
        elif a.shape[0] % 4 == 0:
            self.new(f"{a.name}.reshape({a.shape[0] // 4}, 4)", a.dtype, (a.shape[0] // 4, 4))

    def cat(self) -> None:
        a = self.tile()
        b = self.tile(a.dtype, a.shape)
        axis = self.draw(st.integers(0, len(a.shape) - 1))
        shape = tuple(2 * s if n == axis else s for n, s in enumerate(a.shape))
        if np.prod(shape) <= 2048:
            self.new(f"tw.cat([{a.name}, {b.name}], axis={axis})", a.dtype, shape)

    def gather(self) -> None:
        index = self.tile("i32")
        if self.exact or len(index.shape) == 1:
            source = "n" if self.exact or self.draw(st.booleans()) else "x[q]"
            self.new(f"tw.gather({source}, {index.name}, pad=4)", "i32" if source == "n" else "f32", index.shape)
        else:
            axis = self.draw(st.integers(0, 1))
            self.new(f"tw.gather(x, {index.name}, {axis}, pad=4)", "f32", index.shape)

    def update(self) -> None:
        index = self.tile("i32")
        value = self.tile("i32", index.shape)
        fn = self.pick(("add", "max", "xor"))  # one kind for a program: they do not commute with each other
        kinds = [line.split("tw.atomic_")[1].split("(")[0] for line in self.lines if "tw.atomic_" in line]
        self.emit(f"tw.atomic_{kinds[0] if kinds else fn}(c, {index.name}, {value.name})")

    def dot(self) -> None:
        if not self.with_dots:
            return
        if self.draw(st.booleans()):
            self.emit("acc = tw.zeros((64, 64), tw.float32)")
            self.emit("for k in tw.range(3):")
            self.emit("    acc = tw.dot(tw.load(h, (p, k), (64, 32)), tw.load(h.T, (k, q), (32, 64)), acc)")
            self.new("acc", "f32", (64, 64))
        else:
            self.new("tw.dot(tw.load(h, (p, 0), (64, 32)), tw.load(h, (q, 1), (32, 64)))", "f32", (64, 64))

    def loop(self) -> None:
        carried = self.pick(self.tiles)
        name = f"k{len(self.lines)}"
        self.emit(f"for {name} in tw.range({self.pick(('0', 'p', '1'))}, 3):")
        self._nested(carried, name)

    def branch(self) -> None:
        carried = self.pick(self.tiles)
        self.emit(f"if {self.pick(('p > 0', 'q == 1', 'p + q < 2'))}:")
        self._nested(carried, None)

    def _nested(self, carried: Tile, scalar: str | None) -> None:
        tiles, scalars = list(self.tiles), list(self.scalars)
        self.scalars += [scalar] if scalar else []
        self.indent += 1
        self.statements(self.draw(st.integers(1, 3)), nested=True)
        other = self.tile(carried.dtype, carried.shape)
        self.emit(f"{carried.name} = {carried.name} + {other.name}")
        self.indent -= 1
        self.tiles, self.scalars = tiles, scalars

    def statements(self, count: int, nested: bool = False) -> None:
        kinds = [self.binary, self.binary, self.cast, self.reduce, self.spread, self.scan, self.reshape]
        kinds += [self.cat, self.gather, self.update, self.dot]
        for _ in range(count):
            self.pick(kinds if nested else [*kinds, self.loop, self.branch])()

    def finish(self) -> None:
        """Every store has a place of its own: the order of two that overlap is not defined."""
        for number, tile in enumerate(self.tiles[-3:]):
            value = tile.name if len(tile.shape) == 2 else f"{tile.name}[None, :]"
            self.emit(f"tw.store({'f' if tile.dtype == 'f32' else 'i'}[{number}, p, q], (0, 0), {value})")


@st.composite
def tile_programs(draw: Any, exact: bool = False, with_dots: bool = True) -> str:
    """The text of a kernel."""
    program = Program(draw, exact, with_dots)
    program.emit("p, q = tw.program_id(0), tw.program_id(1)")
    program.load()
    program.load()
    program.statements(draw(st.integers(2, 7)))
    program.finish()
    return "\n".join([HEAD, *program.lines, ""])


def definition(text: str) -> KernelDefinition:
    file = f"<random tiles {next(FILES)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    scope: dict[str, Any] = {"tw": tw}
    exec(compile(text, file, "exec"), scope)
    return KernelDefinition(scope["program"])
