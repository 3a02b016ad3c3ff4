"""The rules of communication that need a look at the whole function (`tilewright.ir.verifier` calls this)."""

from __future__ import annotations

from collections.abc import Iterator

from tilewright.ir.async_ops import Copy
from tilewright.ir.collectives import TileCollective, ViewCollective
from tilewright.ir.comm_ops import Join, Put, ReducePut, Signal, peer_of, view_root
from tilewright.ir.core import Function, IRError, Operation, Value, uses_of
from tilewright.ir.indexed_ops import Atomic, Gather, Scatter
from tilewright.ir.packet_ops import verify_packets
from tilewright.ir.tile_ops import Element, For, If, Load, Store, While, Yield
from tilewright.ir.types import ViewType

#: operations that write to other ranks' tensors
PUTS = Put | ReducePut | TileCollective | ViewCollective


def verify_communication(function: Function) -> None:
    """Ranks write to others by puts alone, every put reaches a signal, and what they put into is read behind a wait."""
    verify_packets(function)
    puts = []
    for op in function.walk():
        if isinstance(op, PUTS):
            puts.append(op)
        elif isinstance(op, Store | Scatter | Atomic) and peer_of(op.view) is not None:
            raise IRError(f"'{op.name}' writes to the tensor of another rank", op.loc, "put it: comm.put")
    if not puts:
        return
    uses = uses_of(function.body)
    received: dict[Value, Operation] = {}
    for put in puts:
        if not isinstance(put, Put | ReducePut):
            received.setdefault(view_root(put.buffer), put)
            continue
        root = view_root(put.view)
        if not isinstance(root.type, ViewType) or not root.type.symmetric:
            put.require(False, f"writes to {_name(root)}, which is not symmetric: no other rank can see it")
        if not signals_of(put, uses):
            message = f"'{put.name}': its token reaches no signal, so that nobody may read what it writes"
            raise IRError(message, put.loc, "pass it on: tw.signal(flag, peer, after=token)")
        received.setdefault(root, put)
    for op in function.walk():
        if isinstance(op, Load | Element | Gather | Copy) and not op.after and view_root(op.view) in received:
            root = view_root(op.view)
            line = received[root].loc.line
            message = f"'{op.name}' reads {_name(root)}, into which ranks put (line {line}), without a token"
            raise IRError(message, op.loc, "wait for the flag that tells of the put: load(..., after=tw.wait(flag))")


def signals_of(put: Put | ReducePut, uses: dict[Value, list[Operation]]) -> set[Signal]:
    """The signals that publish a put, whatever way control flow takes its token. ``uses``: `uses_of` the function."""
    return {op for op in _reached(put.result, uses) if isinstance(op, Signal)}


def _reached(token: Value, uses: dict[Value, list[Operation]]) -> Iterator[Operation]:
    """The operations that take a token, also after it left loops and conditionals."""
    pending, seen = [token], {token}
    while pending:
        value = pending.pop()
        for op in uses.get(value, []):
            yield op
            for target in _passed_on(op, value):
                if target not in seen:
                    seen.add(target)
                    pending.append(target)


def _passed_on(op: Operation, value: Value) -> list[Value]:
    """What carries ``value`` on: an argument of a loop's body, a result of a loop or conditional."""
    if isinstance(op, For):
        return [op.body.block.args[1 + n] for n, init in enumerate(op.inits) if init is value]
    if isinstance(op, While):
        return [r.block.args[n] for r in op.regions for n, init in enumerate(op.inits) if init is value]
    if isinstance(op, Join):
        return [op.result]
    if not isinstance(op, Yield) or op.parent is None or op.parent.parent is None:
        return []
    owner = op.parent.parent.parent
    positions = [n for n, passed in enumerate(op.values) if passed is value]
    if isinstance(owner, If):
        return [owner.results[n] for n in positions]
    if isinstance(owner, For):
        return [v for n in positions for v in (owner.results[n], owner.body.block.args[1 + n])]
    return []


def _name(value: Value) -> str:
    return f"%{value.hint}" if value.hint else "a tensor"
