"""PTX instructions that LLVM has no good operation for, one function each.

All of them are inline assembly with side effects, so that `tilewright.backends.llvm` makes the calls convergent.
Shared-memory addresses are i32 values in the ``shared::cta`` window. Section names are those of the PTX ISA.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilewright.backends.mlir_builder import FunctionBuilder
from tilewright.backends.mlir_builder import ir as mlir

MEMORY = "~{memory}"
#: constraint letters of words of so many bits; bytes lie in 32-bit registers
KIND = {8: "r", 16: "h", 32: "r", 64: "l"}
#: all bits that an address of shared memory has; in a cluster the upper ones say whose
SHARED_MASK = 0x7FFFFFFF


def emit(fb: FunctionBuilder, text: str, kinds: str = "", arguments: Sequence[mlir.Value] = ()) -> None:
    """Inline assembly without results: ``kinds`` has one constraint letter for each argument."""
    fb.inline_asm(None, text, ",".join([*kinds, MEMORY]), arguments)


def guarded(condition: mlir.Value | None, position: int) -> str:
    """The guard ``@$position`` of an instruction, nothing where there is no condition."""
    return "" if condition is None else f"@${position} "


def _emit_if(
    fb: FunctionBuilder, condition: mlir.Value | None, text: str, kinds: str, arguments: Sequence[mlir.Value]
) -> None:
    """One or more instructions (a line each) under a predicate, which is the last operand."""
    guard = guarded(condition, len(arguments))
    lines = "\n".join(guard + line for line in text.split("\n"))
    extra = [] if condition is None else [condition]
    emit(fb, lines, kinds + "b" * len(extra), [*arguments, *extra])


# --- launches: "Parallel Synchronization and Communication Instructions: griddepcontrol" ---------------------


def await_grid(fb: FunctionBuilder) -> None:
    """Wait until the grids that this one depends on have ended and their memory operations are visible."""
    emit(fb, "griddepcontrol.wait;")


# --- mbarrier: "Parallel Synchronization and Communication Instructions: mbarrier" ---------------------------


def init_barrier(fb: FunctionBuilder, address: mlir.Value, arrivals: int) -> None:
    """``mbarrier.init``: a phase completes after ``arrivals`` arrivals."""
    emit(fb, f"mbarrier.init.shared::cta.b64 [$0], {arrivals};", "r", [address])


def wait_parity(fb: FunctionBuilder, address: mlir.Value, parity: mlir.Value, scope: str = "cta") -> None:
    """Wait until the phase of ``parity`` has completed (``mbarrier.try_wait.parity`` in a loop).

    ``scope``: of the arrivals that it acquires. ``${:uid}`` is a number that LLVM makes different for every copy of
    the statement.
    """
    semantics = "" if scope == "cta" else f".acquire.{scope}"
    text = f"""{{
.reg .pred done;
wait_${{:uid}}:
mbarrier.try_wait.parity{semantics}.shared::cta.b64 done, [$0], $1;
@done bra done_${{:uid}};
bra wait_${{:uid}};
done_${{:uid}}:
}}"""
    emit(fb, text, "rr", [address, parity])


def arrive(fb: FunctionBuilder, address: mlir.Value, condition: mlir.Value | None = None) -> None:
    """``mbarrier.arrive``: releases what this thread did before, at CTA scope."""
    _emit_if(fb, condition, "mbarrier.arrive.shared::cta.b64 _, [$0];", "r", [address])


def arrive_in_block(
    fb: FunctionBuilder, address: mlir.Value, block: mlir.Value, condition: mlir.Value | None = None, scope: str = "cta"
) -> None:
    """Arrive at the same place of a block of the cluster; ``scope``: where it releases what this thread did before.

    At cluster scope ptxas puts a fence of the whole GPU before the arrival, which costs hundreds of cycles.
    """
    guard = guarded(condition, 2)
    semantics = "" if scope == "cta" else f".release.{scope}"
    text = f"""{{
.reg .b32 there;
mapa.shared::cluster.u32 there, $0, $1;
{guard}mbarrier.arrive{semantics}.shared::cluster.b64 _, [there];
}}"""
    emit(fb, text, "rr" + "b" * (condition is not None), [address, block, *([] if condition is None else [condition])])


def arrive_expect_tx(
    fb: FunctionBuilder, address: mlir.Value, bytes_: int, condition: mlir.Value | None = None
) -> None:
    """``mbarrier.arrive.expect_tx``: arrive, and let the phase also wait for ``bytes_`` bytes that others bring."""
    _emit_if(fb, condition, f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {bytes_};", "r", [address])


def expect_tx(fb: FunctionBuilder, address: mlir.Value, bytes_: int) -> None:
    """``mbarrier.expect_tx``: let the current phase also wait for ``bytes_`` bytes, without arriving."""
    emit(fb, f"mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [$0], {bytes_};", "r", [address])


# --- fences and barriers --------------------------------------------------------------------------------------


def fence_barrier_init(fb: FunctionBuilder) -> None:
    """``fence.mbarrier_init``: initialised barriers are visible to other threads."""
    emit(fb, "fence.mbarrier_init.release.cluster;")


def fence_async_proxy(fb: FunctionBuilder, space: str = "shared::cta") -> None:
    """``fence.proxy.async``: this thread's accesses to a memory come before later ones of the async proxy."""
    emit(fb, f"fence.proxy.async.{space};")


def acquire_tensor_map(fb: FunctionBuilder, tensor_map: mlir.Value) -> None:
    """``fence.proxy.tensormap``: what wrote a tensor map in global memory comes before its use by the block."""
    emit(fb, "fence.proxy.tensormap::generic.acquire.sys [$0], 128;", "l", [tensor_map])


def block_barrier(fb: FunctionBuilder) -> None:
    """``bar.sync 0``: all threads of the block meet."""
    emit(fb, "bar.sync 0;")


def cluster_barrier(fb: FunctionBuilder, release: bool = True) -> None:
    """``barrier.cluster``: all threads of the cluster that have not ended meet.

    Without ``release`` nothing but initialised barriers (`fence_barrier_init`) need be known to the others.
    """
    arrive_at_cluster(fb, release)
    wait_for_cluster(fb)


def arrive_at_cluster(fb: FunctionBuilder, release: bool = True) -> None:
    """The first half of `cluster_barrier`."""
    emit(fb, f"barrier.cluster.arrive.{'release' if release else 'relaxed'};")


def wait_for_cluster(fb: FunctionBuilder) -> None:
    """The second half of `cluster_barrier`."""
    emit(fb, "barrier.cluster.wait.acquire;")


def cluster_rank(fb: FunctionBuilder) -> mlir.Value:
    """``%cluster_ctarank``: the block's number in its cluster (i32)."""
    rank: mlir.Value = fb.inline_asm(fb.types.i32, "mov.u32 $0, %cluster_ctarank;", "=r", [], side_effects=False)
    return rank


def map_to_block(fb: FunctionBuilder, address: mlir.Value, block: mlir.Value) -> mlir.Value:
    """``mapa``: the shared::cluster address of the same place in a block of the cluster (i32)."""
    text = "mapa.shared::cluster.u32 $0, $1, $2;"
    there: mlir.Value = fb.inline_asm(fb.types.i32, text, "=r,r,r", [address, block], side_effects=False)
    return there


def store_async(fb: FunctionBuilder, address: mlir.Value, word: mlir.Value, bits: int, barrier: mlir.Value) -> None:
    """``st.async``: store a word at a shared::cluster address; its bytes count at a barrier of that block, which
    releases the store to who waits there."""
    text = f"st.async.shared::cluster.mbarrier::complete_tx::bytes.b{bits} [$0], $1, [$2];"
    emit(fb, text, f"r{KIND[bits]}r", [address, word, barrier])


def meet_in_warp(fb: FunctionBuilder) -> None:
    """``bar.warp.sync``: the lanes of the warp meet, and know what all of them have done."""
    emit(fb, "bar.warp.sync 0xffffffff;")


def sync_at_barrier(fb: FunctionBuilder, barrier: mlir.Value, threads: int) -> None:
    """``bar.sync``: wait until ``threads`` threads have come to a hardware barrier, these among them."""
    emit(fb, f"bar.sync $0, {threads};", "r", [barrier])


def arrive_at_barrier(fb: FunctionBuilder, barrier: mlir.Value, threads: int) -> None:
    """``bar.arrive``: count these threads among the ``threads`` of a hardware barrier, and go on."""
    emit(fb, f"bar.arrive $0, {threads};", "r", [barrier])


# --- warps ----------------------------------------------------------------------------------------------------


def set_max_registers(fb: FunctionBuilder, registers: int, increase: bool) -> None:
    """``setmaxnreg``: hand registers back, or wait for them. All warps of the warpgroup run it."""
    direction = "inc" if increase else "dec"
    emit(fb, f"setmaxnreg.{direction}.sync.aligned.u32 {registers};")


# --- hints to the caches: "Cache Eviction Priority Hints" -----------------------------------------------------


def cache_policy(fb: FunctionBuilder, evict: str | None) -> list[mlir.Value]:
    """The operand of ``.L2::cache_hint`` for all of an access: `tile_ops.EVICTION`; none without a hint.

    Made where it is used: ptxas folds it to a constant.
    """
    if evict is None:
        return []
    text = f"createpolicy.fractional.L2::{evict}.b64 $0, 1.0;"
    return [fb.inline_asm(fb.types.i64, text, "=l", [], side_effects=False)]


def load_words(
    fb: FunctionBuilder, pointer: mlir.Value, types: Sequence[mlir.Type], bits: int, evict: str
) -> list[mlir.Value]:
    """``ld.global`` of one, two or four words of ``bits`` bits, with a hint for both caches."""
    count = len(types)
    places = ", ".join(f"${i}" for i in range(count))
    vector, target = (f".v{count}", f"{{{places}}}") if count > 1 else ("", places)
    text = f"ld.global.L1::{evict}.L2::cache_hint{vector}.b{bits} {target}, [${count}], ${count + 1};"
    constraints = ",".join([*[f"={KIND[bits]}"] * count, "l", "l", MEMORY])
    return list(fb.inline_asm(list(types), text, constraints, [pointer, *cache_policy(fb, evict)]))


def store_words(
    fb: FunctionBuilder,
    pointer: mlir.Value,
    words: Sequence[mlir.Value],
    bits: int,
    condition: mlir.Value | None,
    evict: str | None = None,
) -> None:
    """``st.global`` of one, two or four words of ``bits`` bits under a condition: no branch."""
    count, policy = len(words), cache_policy(fb, evict)
    places = ", ".join(f"${i + 1}" for i in range(count))
    vector, source = (f".v{count}", f"{{{places}}}") if count > 1 else ("", places)
    hint, operand = (".L2::cache_hint", f", ${count + 1}") if policy else ("", "")
    text = f"st.global{hint}{vector}.b{bits} [$0], {source}{operand};"
    _emit_if(fb, condition, text, "l" + KIND[bits] * count + "l" * len(policy), [pointer, *words, *policy])


# --- bulk copies: "Data Movement and Conversion Instructions: Bulk Tensor copy" -------------------------------


def _place(first: int, rank: int) -> str:
    return "{" + ", ".join(f"${first + axis}" for axis in range(rank)) + "}"


def load_box(
    fb: FunctionBuilder,
    tensor_map: mlir.Value,
    coordinates: Sequence[mlir.Value],
    destination: mlir.Value,
    barrier_address: mlir.Value,
    blocks: int = 1,
    evict: str | None = None,
) -> None:
    """Start copying a box to shared memory; its bytes count against the barrier. Coordinates: contiguous dim first.

    With ``blocks`` > 1 it goes to the same place of all blocks of the cluster, and counts against the barrier of each.
    """
    rank, policy = len(coordinates), cache_policy(fb, evict)
    arguments = [destination, tensor_map, barrier_address, *coordinates]
    kinds, modifiers, last = "rlr" + "r" * rank, "", ""
    if blocks > 1:
        modifiers, last = ".multicast::cluster", f", ${len(arguments)}"
        arguments.append(fb.const((1 << blocks) - 1, fb.types.i16))
        kinds += "h"
    if policy:
        modifiers, last = f"{modifiers}.L2::cache_hint", f"{last}, ${len(arguments)}"
        arguments += policy
        kinds += "l"
    text = (
        f"cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes{modifiers} "
        f"[$0], [$1, {_place(3, rank)}], [$2]{last};"
    )
    emit(fb, text, kinds, arguments)


def store_boxes(
    fb: FunctionBuilder,
    tensor_map: mlir.Value,
    boxes: Sequence[tuple[Sequence[mlir.Value], mlir.Value]],
    condition: mlir.Value | None,
    update: str | None = None,
    evict: str | None = None,
) -> None:
    """Start copying boxes ``(coordinates, source)`` out of shared memory, as one group, under a condition.

    ``update``: "add" adds them to what is there.
    """
    copy, kind = ("cp.async", "") if update is None else ("cp.reduce.async", f".{update}.tile")
    policy = cache_policy(fb, evict)
    hint, extra = (".L2::cache_hint", ", $1") if policy else ("", "")
    lines, arguments, kinds = [], [tensor_map, *policy], "l" + "l" * len(policy)
    for coordinates, source in boxes:
        at, rank = len(arguments), len(coordinates)
        lines.append(
            f"{copy}.bulk.tensor.{rank}d.global.shared::cta{kind}.bulk_group{hint} "
            f"[$0, {_place(at + 1, rank)}], [${at}]{extra};"
        )
        arguments += [source, *coordinates]
        kinds += "r" * (rank + 1)
    _emit_if(fb, condition, "\n".join([*lines, "cp.async.bulk.commit_group;"]), kinds, arguments)


def wait_stores(fb: FunctionBuilder, pending: int, read: bool) -> None:
    """Wait until at most ``pending`` groups of this thread's bulk stores are unfinished (``read``: unread)."""
    emit(fb, f"cp.async.bulk.wait_group{'.read' if read else ''} {pending};")


# --- copies of single threads: "Data Movement and Conversion Instructions: Asynchronous copy" ---------------------


#: a place in shared memory: a pointer and bytes from there, which become part of the instruction
Place = tuple[mlir.Value, int]


def copy_async(
    fb: FunctionBuilder,
    place: Place,
    pointer: mlir.Value,
    size: int,
    count: mlir.Value | None = None,
    evict: str | None = None,
) -> None:
    """``cp.async`` of 4, 8 or 16 bytes from global to shared memory; zeros from byte ``count`` on.

    ptxas 13.0 takes a uniform part of the address into the instruction, where a hint has its policy in the same uniform
    registers: LDGSTS [R+UR0], desc[UR1], which is illegal. Behind a mask no part of the address is known to be uniform.
    """
    kind, policy = "cg" if size == 16 else "ca", cache_policy(fb, evict)
    address = _address(fb, place)
    if policy:
        address = fb.and_(address, SHARED_MASK)
    hint, extra = (".L2::cache_hint", ", $2") if policy else ("", "")
    sizes, counts = ("", []) if count is None else (f", ${2 + len(policy)}", [count])
    text = f"cp.async.{kind}.shared.global{hint} [$0+{place[1]}], [$1], {size}{sizes}{extra};"
    kinds = "rl" + "l" * len(policy) + "r" * len(counts)
    emit(fb, text, kinds, [address, pointer, *policy, *counts])


def _address(fb: FunctionBuilder, place: Place) -> mlir.Value:
    return fb.ptrtoint(place[0], fb.types.i32)


def commit_copies(fb: FunctionBuilder) -> None:
    """``cp.async.commit_group``: this thread's copies since the last one are a group."""
    emit(fb, "cp.async.commit_group;")


def wait_copies(fb: FunctionBuilder, pending: int) -> None:
    """Wait until at most the ``pending`` youngest groups of this thread's copies are unfinished."""
    emit(fb, f"cp.async.wait_group {pending};")


# --- matrices -------------------------------------------------------------------------------------------------


def store_matrices(fb: FunctionBuilder, address: mlir.Value, words: Sequence[mlir.Value], transposed: bool) -> None:
    """``stmatrix``: 1, 2 or 4 matrices of 8 x 8 16-bit elements; lane l addresses row l % 8 of matrix l / 8."""
    places = ", ".join(f"${i + 1}" for i in range(len(words)))
    trans = ".trans" if transposed else ""
    text = f"stmatrix.sync.aligned.m8n8.x{len(words)}{trans}.shared.b16 [$0], {{{places}}};"
    emit(fb, text, "r" * (len(words) + 1), [address, *words])


def load_matrices(fb: FunctionBuilder, place: Place, count: int, transposed: bool) -> list[mlir.Value]:
    """``ldmatrix``: the words of 1, 2 or 4 matrices of 8 x 16 bytes; lane l addresses row l % 8 of matrix l / 8."""
    places = ", ".join(f"${i}" for i in range(count))
    trans = ".trans" if transposed else ""
    text = f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{places}}}, [${count}+{place[1]}];"
    constraints = ",".join([*["=r"] * count, "r", MEMORY])
    return list(fb.inline_asm([fb.types.i32] * count, text, constraints, [_address(fb, place)]))
