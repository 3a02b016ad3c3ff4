"""Random programs give the same bits before and after the scalar passes.

Floating-point sums over an axis and transcendental functions are left out: NumPy's own order of additions
and vector paths depend on the strides of an array, which the passes change.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
import pytest

from tilewright.ir.builder import Builder
from tilewright.ir.core import Block, Function, Module, Region, Value
from tilewright.ir.interpreter import run
from tilewright.ir.interpreter_numerics import NUMPY
from tilewright.ir.printer import print_module
from tilewright.ir.target import get_target
from tilewright.ir.types import (
    DType,
    ScalarType,
    TileType,
    Type,
    ViewType,
    bf16,
    element_type,
    f16,
    f32,
    i1,
    i8,
    i32,
    i64,
)
from tilewright.ir.verifier import verify
from tilewright.passes import canonicalize, cse, dce, licm  # noqa: F401  (importing them registers the passes)
from tilewright.passes.manager import PassContext, PassManager

CONTEXT = PassContext(get_target("sm_90a"))
DTYPES = (i1, i8, i32, i64, f32, f16, bf16)
SHAPES = ((4, 8), (8, 4), (1, 8), (8,), (32,))
SLOTS = 256  # of 32 elements, in each output
INTS = (0, 0, 1, 1, 2, 3, 7, -1, -8, 127, -128)
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 3.0, -2.75, 1e3, 1e-3, float("inf"), float("nan"))


class Generator:
    """Builds a kernel that reads ``in_*``, computes at random and writes ``out_*``."""

    def __init__(self, seed: int):
        self.rng = Random(seed)
        # few types in one program: then operations meet operations that the passes combine
        self.dtypes = [i32, *self.rng.sample(DTYPES, 2)]
        self.shapes = self.rng.sample(SHAPES, 2)
        views = [(f"{way}_{d}", ViewType((None,), d, (1,), 16)) for way in ("in", "out") for d in DTYPES]
        self.block = Block([*views, ("n", ScalarType(i32)), ("x", ScalarType(f32)), ("p", ScalarType(i1))])
        args = {a.hint: a for a in self.block.args}
        self.inputs = {d: args[f"in_{d}"] for d in DTYPES}
        self.outputs = {d: args[f"out_{d}"] for d in DTYPES}
        self.builder = Builder(self.block)
        self.stores = 0
        pool = [args["n"], args["x"], args["p"]]
        self.statements(pool, 25, depth=2)
        for value in pool:
            self.store(value)
        self.module = Module([Function("random", Region(self.block))])

    def statements(self, pool: list[Value], count: int, depth: int) -> None:
        kinds = ["constant", "unary", "binary", "binary", "binary", "compare", "select", "cast", "bitcast", "load"]
        kinds += ["shape", "shape", "shape", "reduce", "dim", "store", "again", "chain", "chain", "chain", "chain"]
        kinds += ["for", "branch", "loop"] if depth else []
        for _ in range(count):
            kind = self.rng.choice(kinds)
            if kind in ("for", "branch", "loop"):
                getattr(self, f"make_{kind}")(pool, depth - 1)
            elif kind == "store":
                self.store(self.rng.choice(pool))
            else:
                value = getattr(self, f"make_{kind}")(pool)
                value.hint = value.hint or self.rng.choice("abcd")
                pool.append(value)

    # --- values -------------------------------------------------------------------------------

    def type(self) -> Type:
        dtype = self.rng.choice(self.dtypes)
        return ScalarType(dtype) if self.rng.random() < 0.5 else TileType(self.rng.choice(self.shapes), dtype)

    def literal(self, type_: Type) -> Value:
        dtype = element_type(type_)
        value = self.rng.choice(FLOATS if dtype.is_float else INTS)
        return self.builder.constant(value if dtype.bits > 1 else bool(value & 1), type_)

    def of(self, pool: Sequence[Value], type_: Type) -> Value:
        """A value of the type: an earlier one, or a constant."""
        found = [v for v in pool if v.type == type_]
        return self.rng.choice(found) if found and self.rng.random() < 0.6 else self.literal(type_)

    def some(self, pool: Sequence[Value], accept=lambda type_: True) -> Value:
        found = [v for v in pool if accept(v.type)]
        if found and self.rng.random() < 0.9:
            return self.rng.choice(found[-3:] if self.rng.random() < 0.5 else found)
        types = [ScalarType(i32), TileType((8,), i32), *(self.type() for _ in range(4))]
        return self.literal(self.rng.choice([t for t in types if accept(t)]))

    def make_constant(self, pool):
        return self.literal(self.type())

    def make_again(self, pool):
        """The same operation once more, for CSE."""
        ops = [v.op for v in pool if v.op is not None and len(v.op.results) == 1 and not v.op.regions]
        if not ops:
            return self.make_constant(pool)
        return self.builder.insert(self.rng.choice(ops).clone({})).result

    def make_chain(self, pool):
        """Two operations in a row, one on the result of the other."""
        first = self.rng.choice(["unary", "binary", "binary", "compare", "cast", "bitcast", "shape"])
        value = getattr(self, f"make_{first}")(pool)
        second = "unary" if first == "compare" else self.rng.choice([first, first, "unary", "binary"])
        return getattr(self, f"make_{second}")([value])

    def make_unary(self, pool):
        source = self.some(pool)
        dtype = element_type(source.type)
        fns = ["neg", "abs", "floor", "ceil", "sqrt"] if dtype.is_float else ["not"]
        return self.builder.unary(self.rng.choice(fns + ["neg", "abs"] * dtype.is_int), source)

    def make_binary(self, pool):
        lhs = self.some(pool)
        rhs = lhs if self.rng.random() < 0.1 else self.of(pool, lhs.type)
        dtype = element_type(lhs.type)
        if self.rng.random() < 0.5:
            lhs, rhs = rhs, lhs
        fns = ["and", "or", "xor"]
        if dtype.is_int:
            fns += ["add", "sub", "mul", "floordiv", "mod", "max", "min"] * 2
            if self.rng.random() < 0.2:
                return self.builder.binary(self.rng.choice(["shl", "shr"]), lhs, self.builder.constant(3, lhs.type))
        return self.builder.binary(self.rng.choice(["add", "sub", "mul", "div"] if dtype.is_float else fns), lhs, rhs)

    def make_compare(self, pool):
        lhs = self.some(pool)
        rhs = lhs if self.rng.random() < 0.1 else self.of(pool, lhs.type)
        return self.builder.compare(self.rng.choice(["eq", "ne", "lt", "le", "gt", "ge"]), lhs, rhs)

    def make_select(self, pool):
        a = self.some(pool)
        type_ = ScalarType(i1) if isinstance(a.type, ScalarType) else TileType(a.type.shape, i1)
        return self.builder.select(self.of(pool, type_), a, self.of(pool, a.type))

    def make_cast(self, pool):
        return self.builder.cast(self.some(pool), self.rng.choice(self.dtypes))

    def make_bitcast(self, pool):
        source = self.some(pool, lambda t: element_type(t) in (f32, i32))
        return self.builder.bitcast(source, i32 if element_type(source.type) == f32 else f32)

    def make_load(self, pool):
        dtype = self.rng.choice(self.dtypes)
        shape = self.rng.choice([(8,), (32,)])
        view = self.rng.choice([self.inputs, self.outputs])[dtype]
        return self.builder.load(view, [self.of(pool, ScalarType(i32))], shape, self.rng.choice([0, 1]))

    def make_dim(self, pool):
        return self.builder.dim(self.inputs[self.rng.choice(DTYPES)], 0)

    def make_reduce(self, pool):
        source = self.some(pool, lambda t: isinstance(t, TileType) and t.dtype.is_int)
        return self.builder.reduce(self.rng.choice(["sum", "max", "min"]), source, self.rng.randrange(source.type.rank))

    def make_shape(self, pool):
        source, b = self.some(pool), self.builder
        if isinstance(source.type, ScalarType):
            return b.splat(source, self.rng.choice(self.shapes))
        shape = source.type.shape
        shapes = [s for s in (*SHAPES, (2, 4), (2, 4, 4), shape) if np.prod(s) == source.type.size]
        moves = [lambda: b.reshape(source, self.rng.choice(shapes))]
        if len(shape) > 1:
            moves += [lambda: b.transpose(source, self.rng.sample(range(len(shape)), len(shape)))] * 2
        if len(shape) == 2:
            moves.append(lambda: b.extract(source, (0, 2), (1, min(2, shape[1] - 2))) if shape[1] > 2 else source)
        if len(shape) == 1:
            moves.append(lambda: b.expand_dims(source, self.rng.choice([0, 1])))
        if shape[0] == 1:
            moves.append(lambda: b.broadcast(source, (4, *shape[1:])))
        return self.rng.choice(moves)()

    def store(self, value: Value) -> None:
        if not isinstance(value.type, TileType):
            value = self.builder.splat(value, (8,))
        flat = self.builder.reshape(value, (value.type.size,))
        per_slot = max(1, 32 // value.type.size)
        where = self.builder.index(self.stores % SLOTS * per_slot)
        self.builder.store(self.outputs[value.type.dtype], [where], flat)
        self.stores += 1

    # --- control flow -------------------------------------------------------------------------

    def carried(self, pool: list[Value]) -> list[Value]:
        return [self.some(pool) for _ in range(self.rng.randrange(4))]

    def body(self, pool: list[Value], args: list[Value], depth: int) -> list[Value]:
        """Statements, then the values to yield: one of the same type for each argument."""
        inner = [*pool, *args]
        self.statements(inner, self.rng.randrange(6), depth)
        return [a if self.rng.random() < 0.2 else self.of(inner, a.type) for a in args]

    def make_for(self, pool, depth):
        b = self.builder
        lo, hi = b.index(self.rng.randrange(3)), b.index(self.rng.randrange(5))
        bound = pool[0] if self.rng.random() < 0.3 else hi
        loop = b.for_loop(lo, bound, b.index(self.rng.choice([1, 1, 2, 3])), self.carried(pool), ["k"])
        with b.at(loop.body.block):
            b.yield_(self.body([*pool, loop.index], loop.carried, depth))
        pool.extend(loop.results)

    def make_loop(self, pool, depth):
        b = self.builder
        loop = b.while_loop([b.index(0), *self.carried(pool)], ["count"])
        with b.at(loop.condition.block):
            b.yield_([b.compare("lt", loop.condition.block.args[0], b.index(self.rng.randrange(4)))])
        count, *args = loop.body.block.args
        with b.at(loop.body.block):
            values = self.body([*pool, count], args, depth)
            b.yield_([b.add(count, b.index(1)), *values])
        pool.extend(loop.results)

    def make_branch(self, pool, depth):
        b = self.builder
        like = self.carried(pool)
        branch = b.if_else(self.of(pool, ScalarType(i1)), [v.type for v in like])
        for region in branch.regions:
            with b.at(region.block):
                b.yield_(self.body(pool, like, depth))
        pool.extend(branch.results)


def outputs(module: Module, seed: int) -> dict[DType, bytes]:
    """The bytes of each output; NaNs are made equal, since their payload is the hardware's."""
    rng = np.random.default_rng(seed)
    arguments: dict[str, object] = {"n": seed % 4, "x": (-0.0, 1.5, np.nan, np.inf)[seed % 4], "p": bool(seed & 1)}
    for dtype in DTYPES:
        values = rng.choice(np.array(FLOATS if dtype.is_float else INTS), 256)
        arguments[f"in_{dtype}"] = values.astype(NUMPY[dtype])
        arguments[f"out_{dtype}"] = np.zeros(SLOTS * 32, NUMPY[dtype])
    run(module.functions[0], arguments)
    results = {dtype: arguments[f"out_{dtype}"] for dtype in DTYPES}
    for dtype, array in results.items():
        if dtype.is_float:
            array[np.isnan(array)] = np.nan
    return {dtype: array.tobytes() for dtype, array in results.items()}


@pytest.mark.parametrize("seed", range(150))
def test_passes_keep_the_bits(seed):
    module = Generator(seed).module
    verify(module)
    expected = outputs(module, seed)
    for pipeline in ("canonicalize", "cse", "licm", "dce", "canonicalize,cse,licm,canonicalize,dce"):
        changed = PassManager(pipeline, CONTEXT).run(module.clone())
        assert outputs(changed, seed) == expected, f"{pipeline} on\n{print_module(module)}\n{print_module(changed)}"


@pytest.mark.parametrize("seed", range(150, 180))
def test_passes_reach_a_fixed_point(seed):
    module = Generator(seed).module
    for name in ("canonicalize", "cse", "licm", "dce"):
        once = print_module(PassManager(name, CONTEXT).run(module))
        assert print_module(PassManager(name, CONTEXT).run(module)) == once


def test_random_programs_write_something():
    written = [any(any(data) for data in outputs(Generator(seed).module, seed).values()) for seed in range(20)]
    assert all(written)
