"""Errors of programs that communicate: their messages, places and hints."""

from __future__ import annotations

from typing import Any

import pytest

import tilewright.frontend.language as tw
from tilewright.frontend.build import build_module
from tilewright.frontend.definition import KernelDefinition
from tilewright.frontend.errors import CompileError
from tilewright.ir.types import ViewType, bf16, f32, i32, i64


def view(dtype: Any, rank: int) -> ViewType:
    return ViewType((None,) * rank, dtype, (*(None,) * (rank - 1), 1), 16)


TYPES = {"x": view(f32, 2), "s": view(f32, 2), "b": view(bf16, 2), "f": view(i32, 2), "wide": view(i64, 1)}
CASES: list[Any] = []


def case(message: str, hint: str) -> Any:
    def register(kernel: Any) -> Any:
        CASES.append(pytest.param(kernel, message, hint, id=kernel.__name__))
        return kernel

    return register


@case(".peer of view<?x?xf32, strides=[?, 1], align=16>, which is not symmetric", "annotate the kernel's parameter")
def peer_of_a_plain_tensor(x: tw.Tensor):
    x.peer(0)


@case(".peer of view", "a view that .peer gave belongs to one rank")
def peer_of_a_peer(s: tw.Symmetric):
    s.peer(0).peer(1)


@case("tw.put writes to a symmetric tensor", "tw.store writes to other tensors")
def put_to_a_plain_tensor(x: tw.Tensor):
    tw.put(x, (0, 0), tw.zeros((8, 8)))


@case("tw.store to the tensor of another rank", "use tw.put")
def store_to_a_peer(s: tw.Symmetric):
    tw.store(s.peer(0), (0, 0), tw.zeros((8, 8)))


@case("tw.atomic_add to the tensor of another rank", "use tw.put")
def atomic_of_a_peer(f: tw.Symmetric):
    tw.atomic_add(f.peer(0), (0, 0), 1)


@case("tw.scatter to the tensor of another rank", "use tw.put")
def scatter_to_a_peer(s: tw.Symmetric):
    tw.scatter(s.peer(0), tw.arange(8), tw.zeros((8, 8)), 0)


@case("cannot store a f32 tile to a tensor of bf16", ".to(tw.bfloat16)")
def put_of_another_dtype(b: tw.Symmetric):
    tw.put(b, (0, 0), tw.zeros((8, 8)))


@case("flags are int32", "flags[i, j]")
def flag_of_another_dtype(wide: tw.Symmetric):
    tw.wait(wide)


@case("is no view of the own rank's flags", "tw.Symmetric")
def flag_of_a_plain_tensor(x: tw.Tensor):
    tw.wait(x)


@case("is no view of the own rank's flags", "without .peer")
def signal_of_a_peer(f: tw.Symmetric):
    tw.signal(f.peer(1), 1)


@case("tw.signal sets one flag", "index every dimension")
def signal_of_a_row(f: tw.Symmetric):
    tw.signal(f[0], 1)


@case("tw.barrier takes a view of rank one", "world_size()")
def barrier_of_a_matrix(f: tw.Symmetric):
    tw.barrier(f)


@case("'after' takes tokens, got the compile-time int 3", "tw.wait and tw.barrier")
def load_after_a_number(s: tw.Symmetric):
    tw.load(s, (0, 0), (8, 8), after=3)


@case("'after' takes tokens, got token<put>", "tw.wait and tw.barrier")
def load_after_a_put(s: tw.Symmetric, f: tw.Symmetric):
    token = tw.put(s.peer(1), (0, 0), tw.zeros((8, 8)))
    tw.signal(f[0, 0], 1, after=token)
    tw.load(s, (0, 0), (8, 8), after=token)


@pytest.mark.parametrize(("kernel", "message", "hint"), CASES)
def test_frontend(kernel: Any, message: str, hint: str) -> None:
    definition = KernelDefinition(kernel)
    with pytest.raises(CompileError) as caught:
        build_module(definition, {name: TYPES[name] for name in definition.parameter})
    assert message in caught.value.message and hint in caught.value.hint
    assert caught.value.loc.file == __file__ and caught.value.loc.line > definition.loc.line


# --- the whole program --------------------------------------------------------------------------


def put_without_a_signal(s: tw.Symmetric, f: tw.Symmetric):
    tw.put(s.peer(1), (0, 0), tw.zeros((8, 8)))
    tw.signal(f[0, 0], 1)


def load_without_a_token(s: tw.Symmetric, x: tw.Tensor, f: tw.Symmetric):
    token = tw.put(s.peer(1), (0, 0), tw.zeros((8, 8)))
    tw.signal(f[0, 0], 1, after=token)
    tw.wait(f[0, 0])
    tw.store(x, (0, 0), tw.load(s, (0, 0), (8, 8)))


@pytest.mark.parametrize(
    ("kernel", "line", "message", "hint"),
    [
        (put_without_a_signal, 1, "'comm.put': its token reaches no signal", "tw.signal(flag, peer, after=token)"),
        (load_without_a_token, 4, "'tile.load' reads %s, into which ranks put (line", "after=tw.wait(flag)"),
    ],
)
def test_whole_program(kernel: Any, line: int, message: str, hint: str) -> None:
    definition = KernelDefinition(kernel)
    with pytest.raises(CompileError) as caught:
        build_module(definition, {name: TYPES[name] for name in definition.parameter})
    assert message in caught.value.message and hint in caught.value.hint
    assert caught.value.loc.line == definition.loc.line + line
