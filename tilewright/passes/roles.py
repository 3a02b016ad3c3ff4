"""roles: split a kernel with rings into a producer of copies and consumers that compute.

Every operation belongs to the roles that need its result: the producer keeps what fills rings and
the scalar code and control flow behind it, the consumers keep all the rest. Both are cloned from the
one program and what a role does not need is dead code there. A wait for other ranks goes where what comes after it
is, to both roles if need be.
"""

from __future__ import annotations

from collections.abc import Callable

from tilewright.ir.async_ops import Acquire, Alloc, Barrier, Copy, MakeRing, Publish, Role
from tilewright.ir.builder import Builder
from tilewright.ir.comm_ops import Credit, Enter, Leave, WaitEarlier, WaitFlags
from tilewright.ir.core import Block, Effect, Function, Operation, Region, Value, uses_of
from tilewright.ir.target import Target
from tilewright.ir.tile_ops import Dot, For
from tilewright.ir.types import TileType, TokenType
from tilewright.passes.dce import eliminate_dead_code
from tilewright.passes.manager import FunctionPass, PassContext, register_pass

#: registers a thread needs for the address arithmetic of copies: by the engine alone, or by its own loads and stores
PRODUCER_REGISTERS = {"tma": 40, "threads": 96}
#: the same beside consumers that need every register: more than two warpgroups, or with many results of products
FEWEST_REGISTERS = {"tma": 24, "threads": 96}
#: results per thread, of all products of a loop together
MANY_RESULTS = 192
WARPGROUP = 4
#: setmaxnreg takes multiples of 8 between 24 and 256 (PTX ISA, "setmaxnreg")
REGISTER_STEP, MOST_REGISTERS = 8, 240


@register_pass("roles")
class Roles(FunctionPass):
    """Needs hardware barriers between warps and registers that move between them (`Target.has`)."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        copies = [op for op in function.walk() if isinstance(op, Copy)]
        if not copies or not context.target.has("setmaxnreg"):
            return
        body = function.body.block
        shared = [op for op in body.ops if isinstance(op, Alloc | MakeRing)]
        begins = [op for op in body.ops if isinstance(op, Enter)]
        ends = [op for op in body.ops if isinstance(op, Leave) or (isinstance(op, Barrier) and op.scope == "cluster")]
        program = Region(Block())
        program.block.set_ops([op for op in body.ops if op not in [*begins, *shared, *ends]])
        engines = {op.result.type.kind for op in copies if isinstance(op.result.type, TokenType)}
        consumers = int(function.attributes["num_warps"])
        engine = "tma" if engines == {"tma"} else "threads"
        scarce = registers_are_scarce(program, function, context.target)
        blocks = 2 if wants_company(program, consumers) else 1
        if blocks > 1:
            function.attributes["blocks_per_unit"] = blocks
        registers = distribute_registers(context.target, consumers, engine, scarce or blocks > 1, blocks)
        body.set_ops([*begins, *shared])
        b = Builder(body, function.loc)
        produce, _ = _slice(program, lambda op: is_producer(op) or is_wait(op))
        consume, for_nothing = _slice(program, lambda op: not is_producer(op))
        alone = engines == {"tma"}
        b.insert(Role(regions=[produce], kind="producer", warps=WARPGROUP, registers=registers[0], single_thread=alone))
        b.insert(Role(regions=[consume], kind="consumer", warps=consumers, registers=registers[1]))
        for op in ends:
            b.insert(op)
        function.attributes["threads"] = (WARPGROUP + consumers) * context.target.warp_size
        _count_arrivals(function, consumers, context.target)
        _drop_waits(function, for_nothing)


def is_producer(op: Operation) -> bool:
    """Operations with effects that belong to the producer."""
    return isinstance(op, Acquire | Copy | Publish)


def is_wait(op: Operation) -> bool:
    """Waits for other ranks, which belong to the roles that take their tokens, or else to the consumers."""
    return isinstance(op, WaitFlags | WaitEarlier | Credit)


def _slice(program: Region, keep: Callable[[Operation], bool]) -> tuple[Region, set[Operation]]:
    """A clone of the program without the effects that the role does not have; its waits whose token nobody takes."""
    clone = program.clone({})
    uses = uses_of(clone)
    for_nothing = {op for op in clone.walk() if is_wait(op) and op.results[0] not in uses}
    _drop(clone.block, keep)
    return clone, for_nothing


def _drop_waits(function: Function, kept: set[Operation]) -> None:
    """Remove what nobody needs any more, with the waits that only other roles need."""
    eliminate_dead_code(function)
    uses = uses_of(function.body)
    unused = [op for op in function.walk() if is_wait(op) and op not in kept and op.results[0] not in uses]
    for op in unused:
        assert op.parent is not None
        op.parent.ops.remove(op)
    if unused:
        _drop_waits(function, kept)


def _drop(block: Block, keep: Callable[[Operation], bool]) -> None:
    kept = []
    for op in block.ops:
        own_effect = bool(op.effect & ~Effect.READ) and not op.regions
        if not own_effect or keep(op):
            kept.append(op)
            for r in op.regions:
                _drop(r.block, keep)
    block.set_ops(kept)


def registers_are_scarce(program: Region, function: Function, target: Target) -> bool:
    """Whether the results of the matrix products of some block take most of the consumers' registers."""
    words: dict[Block | None, int] = {}
    for op in program.walk():
        if isinstance(op, Dot) and isinstance(op.result.type, TileType):
            words[op.parent] = words.get(op.parent, 0) + op.result.type.size * op.result.type.dtype.bits // 32
    threads = int(function.attributes["num_warps"]) * target.warp_size
    return max(words.values(), default=0) > MANY_RESULTS * threads


def wants_company(program: Region, consumers: int) -> bool:
    """Whether two blocks should share a multiprocessor, if the shared memory suffices (`shared-plan`).

    Where one warpgroup computes, and its warps exchange what they made of some products of a loop as an operand of
    others, the matrix unit idles meanwhile; another block's products fill that in, and no barrier ties the two.
    """
    loops = [op for op in program.walk() if isinstance(op, For)]
    return consumers == WARPGROUP and any(_exchanges(loop.body.block) for loop in loops)


def _exchanges(block: Block) -> bool:
    """Whether vector work on a product makes the right operand, which lies in shared memory, of another one."""
    made: set[Value] = set()
    for op in block.ops:
        if isinstance(op, Dot) and op.b in made:
            return True
        if isinstance(op, Dot) or any(v in made for o in op.walk() for v in o.operands):
            made.update(op.results)
    return False


def distribute_registers(
    target: Target, consumers: int, engine: str, scarce: bool = False, blocks: int = 1
) -> tuple[int, int]:
    """Registers per thread of producer and consumers: the kernel starts with equal shares of the file.

    ``blocks``: how many share a multiprocessor.
    """
    scarce |= consumers > 2 * WARPGROUP
    producer = (FEWEST_REGISTERS if scarce else PRODUCER_REGISTERS)[engine]
    size = target.warp_size
    equal = min(
        target.registers_per_unit // (blocks * (WARPGROUP + consumers) * size) // REGISTER_STEP * REGISTER_STEP, 248
    )
    if producer >= equal:
        return 0, 0
    spare = (equal - producer) * WARPGROUP
    return producer, min(MOST_REGISTERS, equal + spare // consumers // REGISTER_STEP * REGISTER_STEP)


def _count_arrivals(function: Function, consumers: int, target: Target) -> None:
    """How many arrivals fill and free a stage.

    Full: one (the elected thread announces the bytes) where the engine copies everything, for all rings, else every
    producing thread: all wait for every stage, and consumers may not give one back before all have got it.
    Free: one of each consumer warpgroup, of all blocks that share copies.
    """
    kinds = {
        t.type.kind
        for op in function.walk()
        if isinstance(op, Publish)
        for t in op.tokens
        if isinstance(t.type, TokenType)
    }
    for op in function.walk():
        if isinstance(op, MakeRing):
            op.producers = 1 if kinds == {"tma"} else WARPGROUP * target.warp_size
            op.consumers = consumers // WARPGROUP * op.ctas
