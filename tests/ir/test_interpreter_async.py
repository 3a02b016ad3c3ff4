"""The interpreter: the rules of asynchronous code, each broken once."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from kernel_checks import normal

from tilewright.ir.async_ops import Acquire, Await, Barrier, BulkWait, Copy, Publish, Release, Role, Wait
from tilewright.ir.core import Function, IRError, Module, Operation, replace_uses
from tilewright.ir.interpreter import run
from tilewright.ir.parser import parse_module
from tilewright.ir.verifier import verify

BF16 = ml_dtypes.bfloat16


def parse(text: str) -> Function:
    module = parse_module(text, "k.tw", text_locations=True)
    verify(module)
    return module.functions[0]


SCHEDULED = """func @gemm(%A: view<?x?xbf16, strides=[?, 1], align=16>, %B: view<?x?xbf16, strides=[?, 1], align=16>,
           %C: view<?x?xbf16, strides=[?, 1], align=16>) {persistent = true} {
  %0 = tile.constant {value = 0} : i32
  %1 = tile.constant {value = 1} : i32
  %15 = tile.constant {value = 15} : i32
  %16 = tile.constant {value = 16} : i32
  %k = tile.dim %A {axis = 1} : i32
  %ks = tile.add %k, %15 : i32
  %steps = tile.floordiv %ks, %16 : i32
  %last = tile.sub %steps, %1 : i32
  %gm = tile.num_programs {axis = 0} : i32
  %gn = tile.num_programs {axis = 1} : i32
  %tiles = tile.mul %gm, %gn : i32
  %first = tile.block_id : i32
  %jump = tile.num_blocks : i32
  %zero = tile.constant {value = 0.0} : tile<32x16xf32>
  %loads = async.ring {consumers = 2} : ring<3>
  %as = async.alloc ring(%loads) : buffer<3 x slot<32x16xbf16, shared<none, order=[1,0], shape=[32,16], bits=16>>>
  %bs = async.alloc ring(%loads) : buffer<3 x slot<16x16xbf16, shared<none, order=[1,0], shape=[16,16], bits=16>>>
  %stage = async.ring {producers = 2} : ring<1>
  %cs = async.alloc ring(%stage) : buffer<1 x slot<32x16xbf16, shared<none, order=[1,0], shape=[32,16], bits=16>>>
  async.role @producer {warps = 4, single_thread = true} {
    %used = tile.for %t = %first to %tiles step %jump iter(%base = %0) : i32 {
      %m = tile.mod %t, %gm : i32
      %n = tile.floordiv %t, %gm : i32
      tile.for %i = %0 to %steps step %1 {
        %c = tile.add %base, %i : i32
        async.acquire %loads, %c
        %a = async.slot %as, %c : slot<32x16xbf16, shared<none, order=[1,0], shape=[32,16], bits=16>>
        %b = async.slot %bs, %c : slot<16x16xbf16, shared<none, order=[1,0], shape=[16,16], bits=16>>
        %ta = async.copy %A, [%m, %i], %a : token<tma>
        %tb = async.copy %B, [%i, %n], %b : token<tma>
        async.publish %loads, %c, [%ta, %tb]
        tile.yield []
      }
      %next = tile.add %base, %steps : i32
      tile.yield [%next]
    }
  }
  async.role @consumer {warps = 8, registers = 240} {
    %used, %done = tile.for %t = %first to %tiles step %jump iter(%base = %0, %turn = %0) : i32, i32 {
      async.await %loads, %base
      %a0 = async.slot %as, %base : slot<32x16xbf16, shared<none, order=[1,0], shape=[32,16], bits=16>>
      %b0 = async.slot %bs, %base : slot<16x16xbf16, shared<none, order=[1,0], shape=[16,16], bits=16>>
      %acc0, %g0 = async.dot %a0, %b0, %zero : tile<32x16xf32>, token<mma>
      %acc, %g = tile.for %i = %1 to %steps step %1 iter(%old = %acc0, %before = %g0) : tile<32x16xf32>, token<mma> {
        %c = tile.add %base, %i : i32
        async.await %loads, %c
        %a = async.slot %as, %c : slot<32x16xbf16, shared<none, order=[1,0], shape=[32,16], bits=16>>
        %b = async.slot %bs, %c : slot<16x16xbf16, shared<none, order=[1,0], shape=[16,16], bits=16>>
        %new, %group = async.dot %a, %b, %old : tile<32x16xf32>, token<mma>
        async.wait [], token(%before) {pending = 1}
        %p = tile.sub %c, %1 : i32
        async.release %loads, %p
        tile.yield [%new, %group]
      }
      %sum = async.wait [%acc], token(%g) : tile<32x16xf32>
      %e = tile.add %base, %last : i32
      async.release %loads, %e
      %out = tile.cast %sum : tile<32x16xbf16>
      %slot = async.slot %cs, %turn : slot<32x16xbf16, shared<none, order=[1,0], shape=[32,16], bits=16>>
      async.acquire %stage, %turn
      async.local_store %out, %slot
      async.fence
      async.publish %stage, %turn, []
      %next = tile.add %base, %steps : i32
      %following = tile.add %turn, %1 : i32
      tile.yield [%next, %following]
    }
  }
  async.role @storer {warps = 1} {
    %done = tile.for %t = %first to %tiles step %jump iter(%turn = %0) : i32 {
      %m = tile.mod %t, %gm : i32
      %n = tile.floordiv %t, %gm : i32
      async.await %stage, %turn
      %slot = async.slot %cs, %turn : slot<32x16xbf16, shared<none, order=[1,0], shape=[32,16], bits=16>>
      async.bulk_store %slot, %C, [%m, %n]
      async.bulk_wait
      async.release %stage, %turn
      %following = tile.add %turn, %1 : i32
      tile.yield [%following]
    }
  }
}"""


def run_gemm(function: Function, m: int = 70, n: int = 50, k: int = 100, blocks: int = 2) -> None:
    """Run the scheduled GEMM and compare with float64."""
    a, b, c = normal(m, k, dtype="bf16"), normal(k, n, dtype="bf16", seed=1), np.full((m, n), np.nan, BF16)
    run(function, [a, b, c], grid=(-(-m // 32), -(-n // 16)), blocks=blocks)
    want = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(c.astype(np.float64), want, rtol=8e-3, atol=1e-2)


@pytest.mark.parametrize("size", [(70, 50, 100), (32, 16, 16), (33, 17, 49)])
@pytest.mark.parametrize("blocks", [1, 3])
def test_scheduled_gemm(size: tuple[int, int, int], blocks: int) -> None:
    run_gemm(parse(SCHEDULED), *size, blocks)


def erase(op: Operation, root: Module) -> None:
    """Delete an operation; uses of its results become uses of its operands."""
    assert op.parent is not None
    op.parent.set_ops([o for o in op.parent.ops if o is not op])
    replace_uses(root.functions[0].body, dict(zip(op.results, op.operands, strict=False)))


SYNCHRONISING = (Acquire, Publish, Await, Release, Wait, BulkWait)
NUMBER_OF_SYNCHRONISING = 13


def synchronising(module: Module) -> list[Operation]:
    return [op for op in module.walk() if isinstance(op, SYNCHRONISING)]


def test_all_synchronising_operations_are_tried() -> None:
    assert len(synchronising(parse_module(SCHEDULED))) == NUMBER_OF_SYNCHRONISING


@pytest.mark.parametrize("number", range(NUMBER_OF_SYNCHRONISING))
def test_a_missing_wait_publish_or_release_is_an_error(number: int) -> None:
    module = parse_module(SCHEDULED, "k.tw", text_locations=True)
    op = synchronising(module)[number]
    erase(op, module)
    verify(module)
    with pytest.raises(IRError) as caught:
        run_gemm(module.functions[0])
    assert caught.value.loc.file == "k.tw" and caught.value.loc.line > 20


def edited(old: str, new: str, count: int = 1) -> Function:
    assert SCHEDULED.count(old) >= 1
    return parse(SCHEDULED.replace(old, new, count))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{pending = 1}", "{pending = 2}", "slot 0 of %as is released while a dot in flight reads it"),
        ("token(%g) :", "token(%g) {pending = 1} :", "is among the 1 that may stay in flight"),
        ("tile.cast %sum", "tile.cast %acc", "'tile.cast': reads %acc while its dot is in flight"),
        ("[%ta, %tb]", "[%ta]", "slot 0 of %bs is read while a copy into it is in flight"),
        ("async.release %loads, %p", "async.release %loads, %c", "is released while a dot in flight reads it"),
        ("async.release %loads, %e", "async.release %loads, %e async.release %loads, %e", "more often than its 2 arr"),
        ("async.publish %loads, %c, [%ta, %tb]", "async.publish %loads, %i, [%ta, %tb]", "published more often"),
        ("async.bulk_wait", "async.bulk_wait {pending = 1}", "is released while a bulk store in flight reads it"),
        ("async.await %stage, %turn", "async.await %stage, %turn async.barrier", "deadlock"),
        ("async.fence", "async.release %stage, %turn", "released by role @consumer, which did not await it"),
        ("async.acquire %stage, %turn", "async.acquire %stage, %0", "which did not wait for its release (acquire)"),
    ],
)  # fmt: skip
def test_wrong_schedules(old: str, new: str, message: str) -> None:
    with pytest.raises(IRError, match=re.escape(message)) as caught:
        run_gemm(edited(old, new))
    assert caught.value.loc.file == "k.tw"


def test_a_deadlock_names_roles_and_operations() -> None:
    function = edited("async.publish %stage, %turn, []", "")
    with pytest.raises(IRError) as caught:
        run_gemm(function)
    text = str(caught.value)
    assert "deadlock" in text
    assert re.search(r"role @consumer: 'async.acquire' at \"k.tw\":\d+:7 waits for stage 0 of %stage", text)
    assert re.search(r"role @storer: 'async.await' at \"k.tw\":\d+:7 waits for stage 0 of %stage to be published", text)
    assert re.search(r"role @producer: 'async.acquire' at \"k.tw\":\d+:9 waits for stage . of %loads", text)


SLOT = "slot<4x8xf32, shared<none, order=[1,0], shape=[4,8], bits=32>>"


def single(body: str) -> Function:
    """A kernel without roles: one buffer of two slots, %s and %d as global memory."""
    view = "view<4x8xf32, strides=[8, 1], align=16>"
    return parse(f"""func @f(%s: {view}, %d: {view}) {{
      %0 = tile.constant {{value = 0}} : i32
      %1 = tile.constant {{value = 1}} : i32
      %buffer = async.alloc : buffer<2 x {SLOT}>
      %a = async.slot %buffer, %0 : {SLOT}
      %b = async.slot %buffer, %1 : {SLOT}
      {body}
    }}""")


def test_waiting_for_copies_without_a_ring() -> None:
    body = """%t = async.copy %s, [%0, %0], %a : token<threads>
      async.wait [], token(%t)
      %x = async.local_load %a : tile<4x8xf32>
      tile.store %d, [%0, %0], %x"""
    s, d = normal(4, 8, dtype="f32"), np.zeros((4, 8), np.float32)
    run(single(body), [s, d])
    assert np.array_equal(d, s)
    with pytest.raises(IRError, match="read while a copy into it is in flight"):
        run(single(body.replace("async.wait [], token(%t)", "")), [s, d])
    with pytest.raises(IRError, match="in flight when the program ends; nobody waits for it"):
        run(single(body.split("\n", 1)[0]), [s, d])


def test_a_bulk_store_reads_late() -> None:
    body = """%x = tile.load %s, [%0, %0] : tile<4x8xf32>
      async.local_store %x, %a
      async.bulk_store %a, %d, [%0, %0]
      async.bulk_wait
      async.local_store %x, %a"""
    s, d = normal(4, 8, dtype="f32"), np.zeros((4, 8), np.float32)
    run(single(body), [s, d])
    assert np.array_equal(d, s)
    with pytest.raises(IRError, match="slot 0 of %buffer is overwritten while a bulk store in flight reads it"):
        run(single(body.replace("async.bulk_wait", "")), [s, d])


def test_slots_that_nobody_wrote() -> None:
    s = np.zeros((4, 8), np.float32)
    with pytest.raises(IRError, match="slot 1 of %buffer is read, but nothing was written to it"):
        run(single("%x = async.local_load %b : tile<4x8xf32>"), [s, s])


EXCHANGE = """%x = tile.load %s, [%0, %0] : tile<4x8xf32>
  async.role @one {warps = 4} {
    async.local_store %x, %a
    async.barrier
  }
  async.role @two {warps = 4} {
    async.barrier
    %y = async.local_load %a : tile<4x8xf32>
    tile.store %d, [%0, %0], %y
  }"""


def test_a_block_barrier_shows_stores_to_all_roles() -> None:
    s, d = normal(4, 8, dtype="f32"), np.zeros((4, 8), np.float32)
    run(single(EXCHANGE), [s, d])
    assert np.array_equal(d, s)
    with pytest.raises(IRError, match="read by role @two, which holds no stage of it"):
        run(single(EXCHANGE.replace("async.barrier", "async.fence")), [s, d])
    with pytest.raises(IRError, match=r"role @one: 'async.barrier' at .* waits for the other roles"):
        run(single(EXCHANGE.split("async.role @two")[0] + "async.role @two {warps = 4} { async.fence }"), [s, d])


TURNS = """%ring = async.ring {consumers = CONSUMERS} : ring<2>
  %x = tile.load %s, [%0, %0] : tile<4x8xf32>
  %n = tile.constant {value = 8} : i32
  %2 = tile.constant {value = 2} : i32
  async.role @producer {warps = 1} {
    tile.for %i = %0 to %n step %1 {
      async.acquire %ring, %i
      async.publish %ring, %i, []
      tile.yield []
    }
  }
  async.role @even {warps = 4} {
    tile.for %i = %0 to %n step STEP {
      async.await %ring, %i
      async.release %ring, %i
      tile.yield []
    }
  }
  async.role @odd {warps = 4} {
    tile.for %i = FIRST to %n step STEP {
      async.await %ring, %i
      async.release %ring, %i
      tile.yield []
    }
  }"""


@pytest.mark.parametrize("unit", [1, 4, 128])
@pytest.mark.parametrize("together", [True, False])
def test_consumers_share_stages_or_take_turns(unit: int, together: bool) -> None:
    s = np.zeros((4, 8), np.float32)

    def text(consumers: int, together: bool) -> str:
        steps = ("%1", "%0") if together else ("%2", "%1")
        return TURNS.replace("CONSUMERS", str(consumers)).replace("STEP", steps[0]).replace("FIRST", steps[1])

    run(single(text(2 * unit if together else unit, together)), [s, s])
    with pytest.raises(IRError, match=r"deadlock|more often|awaited after its release"):
        run(single(text(2 * unit if not together else unit, together)), [s, s])


def test_roles_and_types_used_here() -> None:
    """The GEMM has what the schedule tests are about."""
    kinds = {type(op) for op in parse(SCHEDULED).walk()}
    assert {Role, Copy, *SYNCHRONISING} <= kinds and Barrier not in kinds


def test_a_gemm_of_real_size() -> None:
    """Ragged on every side, with the tiles of a GPU; well under a second."""
    text = """func @gemm(%a: view<?x?xbf16, strides=[?, 1], align=16>, %b: view<?x?xbf16, strides=[?, 1], align=16>,
           %c: view<?x?xbf16, strides=[?, 1], align=16>, %steps: i32) {
      %m = tile.program_id {axis = 0} : i32
      %n = tile.program_id {axis = 1} : i32
      %0 = tile.constant {value = 0} : i32
      %1 = tile.constant {value = 1} : i32
      %zero = tile.constant {value = 0.0} : tile<128x256xf32>
      %acc = tile.for %i = %0 to %steps step %1 iter(%x = %zero) : tile<128x256xf32> {
        %ta = tile.load %a, [%m, %i] : tile<128x64xbf16>
        %tb = tile.load %b, [%i, %n] : tile<64x256xbf16>
        %d = tile.dot %ta, %tb, %x : tile<128x256xf32>
        tile.yield [%d]
      }
      %o = tile.cast %acc : tile<128x256xbf16>
      tile.store %c, [%m, %n], %o
    }"""
    a, b, c = (
        normal(1000, 1003, dtype="bf16"),
        normal(1003, 1111, dtype="bf16", seed=1),
        np.full((1000, 1111), np.nan, BF16),
    )
    run(parse(text), [a, b, c, 16], grid=(8, 5))
    want = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(c.astype(np.float64), want, rtol=8e-3, atol=1e-2)
