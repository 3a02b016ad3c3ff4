"""Packets: what is sent arrives, whatever a tile's shape and type, and what breaks their rules is refused."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tilewright as tw
from tests.support.comm_cases import all_ranks, own, schedule
from tilewright.compiler.errors import ExecutionError
from tilewright.frontend.errors import CompileError
from tilewright.ir.core import IRError
from tilewright.ir.packet_ops import Receive, Send
from tilewright.ir.target import get_target
from tilewright.ir.types import DTYPES
from tilewright.passes.check_protocol import check
from tilewright.passes.manager import PassContext

DTYPES_OF = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "i8": np.int8, "i32": np.int32, "f16": np.float16}


@tw.kernel
def exchange(x: tw.Tensor, y: tw.Tensor, packets: tw.Symmetric, *, M: tw.constexpr, N: tw.constexpr):
    """y (world, m, n) = x of each rank; packets (2, world, programs, M * N * bytes / 4) in turn."""
    me, world, i = tw.rank(), tw.world_size(), tw.program_id(0)
    places = packets[tw.turn()]
    tile = tw.load(x, (i, 0), (M, N))
    for hop in tw.range(world):
        tw.send(places.peer((me + hop) % world)[me, i], tile)
    for source in tw.range(world):
        tw.store(y[source], (i, 0), tw.receive(places[source, i], (M, N), x.dtype))


@tw.kernel
def pass_sum_on(x: tw.Tensor, y: tw.Tensor, packets: tw.Symmetric, *, N: tw.constexpr):
    """y = the sum over the ranks up to this one: it comes from the rank before, which waits for the one before it."""
    me, world = tw.rank(), tw.world_size()
    total = tw.load(x, 0, N)
    if me > 0:
        total = total + tw.receive(packets[tw.turn(), 0], N, tw.float32)
    if me + 1 < world:
        tw.send(packets[tw.turn()].peer(me + 1)[0], total)
    tw.store(y, 0, total)


@tw.kernel
def nobody_receives(x: tw.Tensor, packets: tw.Symmetric):
    after = (tw.rank() + 1) % tw.world_size()
    tw.send(packets.peer(after)[0], tw.load(x, 0, 128))


@tw.kernel
def both_wait(x: tw.Tensor, y: tw.Tensor, packets: tw.Symmetric):
    after = (tw.rank() + 1) % tw.world_size()
    tile = tw.receive(packets[0], 128, tw.float32)
    tw.send(packets.peer(after)[0], tw.load(x, 0, 128))
    tw.store(y, 0, tile)


@tw.kernel
def sent_twice(x: tw.Tensor, y: tw.Tensor, packets: tw.Symmetric):
    after = (tw.rank() + 1) % tw.world_size()
    for _ in tw.range(2):
        tw.send(packets.peer(after)[0], tw.load(x, 0, 128))
    tw.store(y, 0, tw.receive(packets[0], 128, tw.float32))


@tw.kernel
def looked_at(x: tw.Tensor, y: tw.Tensor, packets: tw.Symmetric):
    after = (tw.rank() + 1) % tw.world_size()
    tw.send(packets.peer(after)[0], tw.load(x, 0, 128))
    tw.store(y, 0, tw.load(packets[0], 0, 128).to(tw.float32) + tw.receive(packets[0], 128, tw.float32))


@tw.kernel
def of_two_sizes(x: tw.Tensor, y: tw.Tensor, packets: tw.Symmetric):
    after = (tw.rank() + 1) % tw.world_size()
    tw.send(packets.peer(after)[0], tw.load(x, 0, 128))
    tw.store(y, 0, tw.receive(packets[0], 64, tw.float32))


def run(
    world: Any, dtype: str, m: int, n: int, programs: int, launches: int, num_warps: int | None = None, more: int = 0
) -> None:
    """``more``: packets that a row has beside those of its tile."""
    rng, ranks = np.random.default_rng(m * n), range(world.size)
    packets = world.zeros((2, world.size, programs, m * n * DTYPES[dtype].bytes // 4 + more), "int64")
    options = {} if num_warps is None else {"num_warps": num_warps}
    for _ in range(launches):
        x = [(100 * rng.standard_normal((programs * m, n))).astype(DTYPES_OF[dtype]) for _ in ranks]
        y = [np.zeros((world.size, programs * m, n), DTYPES_OF[dtype]) for _ in ranks]
        world.launch(exchange, (programs,), x, y, packets, M=m, N=n, **options)
        for part in y:
            np.testing.assert_array_equal(part, np.stack(x))


TILES = [
    ("f32", 1, 256, 4),
    ("f16", 16, 2, 1),
    ("bf16", 4, 64, 4),
    ("bf16", 8, 256, 2),
    ("i8", 2, 64, 4),
    ("i32", 4, 8, 4),
]


@pytest.mark.parametrize(
    ("target", "dtype", "m", "n", "num_warps"),
    [
        *((target, *tile) for target in ("interpreter", "sm_90a") for tile in TILES),
        *((target, *tile) for target in ("sm_80", "gfx942") for tile in TILES[:3]),
    ],
)
def test_tiles_arrive(target: str, dtype: str, m: int, n: int, num_warps: int) -> None:
    """Threads with many packets, with one, and with copies of one."""
    if target == "interpreter":
        run(tw.World.interpreter(3, seed=1), dtype, m, n, 2, 3)
    else:
        run(tw.World.emulated(target, 2, races=True, seed=3), dtype, m, n, 2, 2, num_warps)


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_launches_of_any_world(ranks: int) -> None:
    run(tw.World.emulated("sm_90a", ranks, seed=ranks), "bf16", 1, 256, 3, 4)


def test_rows_of_odd_lengths() -> None:
    """Two packets at once would lie across 16 bytes."""
    run(tw.World.emulated("sm_90a", 2), "bf16", 1, 512, 3, 2, 2, more=1)


def test_a_chain_of_ranks() -> None:
    """Each waits for the one before, long after its own launch began."""
    with tw.World.emulated("sm_90a", 4, races=True, seed=2) as world:
        packets = world.zeros((2, 1, 64), "int64")
        for launch in range(3):
            x = [np.full(64, rank + launch, np.float32) for rank in range(4)]
            y = [np.zeros(64, np.float32) for _ in range(4)]
            world.launch(pass_sum_on, (1,), x, y, packets, N=64)
            for rank in range(4):
                np.testing.assert_array_equal(y[rank], sum(x[: rank + 1]))


def test_vectors_of_two_packets() -> None:
    types = {"x": tw.spec("bf16", ("M", "N"), align=16), "y": tw.spec("bf16", ("W", "M", "N"), align=16)}
    packets = tw.spec("i64", (2, "W", "T", "P"), align=16)
    artifact = tw.compile(exchange, target="sm_90a", args={**types, "packets": packets, "M": 1, "N": 1024})
    ptx = artifact.asm["ptx"]
    assert len(re.findall(r"st\.relaxed\.sys\.global\.v2\.b64", ptx)) == 2, "8 elements of a thread are 4 packets"
    assert "ld.relaxed.sys.global.v2.b64" in ptx
    assert ptx.count("st.release.sys") == ptx.count("trap;") > 0, "there are records of faults, and no flags"


# --- what is refused --------------------------------------------------------------------------------

TYPES: dict[str, Any] = {"x": own("f32", 1), "y": own("f32", 1), "packets": all_ranks("i64", 2)}


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (nobody_receives, "nobody waits for flag"),
        (both_wait, "deadlock"),
        (sent_twice, "double signal"),
    ],
)
def test_protocols_are_checked(kernel: Any, message: str) -> None:
    types = {name: type_ for name, type_ in TYPES.items() if kernel is not nobody_receives or name != "y"}
    module = schedule(kernel, types, "sm_90a")
    with pytest.raises(IRError, match=message):
        check(module.functions[0], PassContext(get_target("sm_90a")))


@pytest.mark.parametrize("target", ["sm_90a", "gfx942"])
def test_packets_need_a_credit(target: str) -> None:
    types = {"x": own("f32", 2), "y": own("f32", 3), "packets": all_ranks("i64", 4), "M": 1, "N": 128}
    module, context = schedule(exchange, types, target), PassContext(get_target(target))
    check(module.functions[0], context)
    sends = [op for op in module.functions[0].walk() if isinstance(op, Send)]
    credits = {token.op for op in sends for token in op.after}
    assert len(credits) == 1
    for op in sends:
        op.after = []
    (credit,) = credits
    assert credit is not None and credit.parent is not None
    credit.parent.ops.remove(credit)
    with pytest.raises(IRError, match="missing credit: 'comm.send'"):
        check(module.functions[0], context)


@pytest.mark.parametrize(("kernel", "message"), [(looked_at, "holds packets"), (of_two_sizes, "tiles of one size")])
def test_packets_are_for_packets(kernel: Any, message: str) -> None:
    with pytest.raises((IRError, CompileError), match=message):
        schedule(kernel, TYPES, "sm_90a")


def test_deadlocks_and_repeats_in_the_interpreter() -> None:
    world = tw.World.interpreter(2)
    arrays = [[np.zeros(128, np.float32) for _ in range(2)] for _ in range(2)]
    packets = world.zeros((1, 128), "int64")
    with pytest.raises(ExecutionError, match="packets of %packets of rank . to be sent"):
        world.launch(both_wait, (1,), *arrays, packets)
    with pytest.raises(ExecutionError, match="sent twice in a launch"):
        world.launch(sent_twice, (1,), *arrays, packets)


@tw.kernel
def send_wide(x: tw.Tensor, packets: tw.Symmetric):
    tw.send(packets[0], tw.load(x, 0, 128))


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ({"x": own("f64", 1), "packets": all_ranks("i64", 2)}, "an element of tw.float64 does not fit"),
        ({"x": own("f32", 1), "packets": all_ranks("i32", 2)}, "takes a row of packets"),
        ({"x": own("f32", 1), "packets": all_ranks("i64", 3)}, "takes a row of packets"),
    ],
)
def test_errors(types: dict[str, Any], message: str) -> None:
    with pytest.raises(CompileError, match=message):
        schedule(send_wide, types, "sm_90a")


@tw.kernel
def send_to_none(x: tw.Tensor, packets: tw.Tensor):
    tw.send(packets[0], tw.load(x, 0, 128))


def test_packets_are_symmetric() -> None:
    with pytest.raises(CompileError, match="tw.send writes to a symmetric tensor"):
        schedule(send_to_none, {"x": own("f32", 1), "packets": own("i64", 2)}, "sm_90a")


def test_receiving_is_for_tiles() -> None:
    types = {"x": own("f32", 2), "y": own("f32", 3), "packets": all_ranks("i64", 4), "M": 1, "N": 128}
    module = schedule(exchange, types, "sm_90a")
    (receive,) = [op for op in module.functions[0].walk() if isinstance(op, Receive)]
    assert str(receive.result.type).startswith("tile<1x128xf32")
