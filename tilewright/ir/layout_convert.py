"""How a tile gets from one register layout into another, and what that costs.

Costs are cycles of one warp's share of the shared-memory pipeline, which serves shuffles too; work of the vector
units and waiting at barriers are put in the same units by the factors below.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

from tilewright.ir.layout_exchange import SCRATCH_LIMIT, ExchangePlan, plan_exchange
from tilewright.ir.layout_linear import LinearLayout
from tilewright.ir.layout_shared import (
    SharedLayout,
    access_phases,
    choose_shared_layout,
    shared_candidates,
    shared_cycles,
)
from tilewright.ir.layout_shuffle import ShufflePlan, plan_shuffles

#: a select of one word in all lanes of a warp, and a barrier with the latency of the accesses around it
SELECT_CYCLES = {"nvidia": 0.5, "cdna3": 1.0, "cdna4": 1.0}
BARRIER_CYCLES = 16


@dataclass(frozen=True)
class ConversionPlan:
    """``kind``: "identity", "registers", "shuffle" or "shared"; the plan of that kind is set.

    ``whole``: the layout of the whole tile in scratch, where layouts repeat different cores and cannot be sliced.
    """

    kind: str
    cost: float
    registers: tuple[int, ...] | None = None
    shuffles: ShufflePlan | None = None
    exchange: ExchangePlan | None = None
    whole: SharedLayout | None = None

    @property
    def scratch_bytes(self) -> int:
        """Shared memory that the conversion borrows."""
        memory = self.exchange or self.whole
        return 0 if memory is None else memory.bytes


@lru_cache(maxsize=1024)
def plan_conversion(
    source: LinearLayout, result: LinearLayout, element_bits: int, target: str, scratch_limit: int = SCRATCH_LIMIT
) -> ConversionPlan:
    """The cheapest way for elements of ``element_bits`` (bools count 8). ``target``: nvidia, cdna3 or cdna4.

    ``scratch_limit`` (bytes) is kept where slices along registers or warps allow.
    """
    permutation = source.register_permutation(result)
    if permutation is not None:
        kind = "identity" if permutation == list(range(source.num_registers)) else "registers"
        return ConversionPlan(kind, 0.0, registers=tuple(permutation))
    plans = [_shared_plan(source, result, element_bits, target, scratch_limit)]
    shuffles = plan_shuffles(source, result, element_bits)
    if shuffles is not None:
        plans.insert(0, ConversionPlan("shuffle", _shuffle_cost(shuffles, element_bits, target), shuffles=shuffles))
    return min(plans, key=lambda plan: plan.cost)


def conversion_cost(source: LinearLayout, result: LinearLayout, element_bits: int, target: str) -> float:
    """Cycles of `plan_conversion`'s plan; 0 where registers are renamed only."""
    return plan_conversion(source, result, element_bits, target).cost


def _shuffle_cost(plan: ShufflePlan, element_bits: int, target: str) -> float:
    words = max(1, element_bits // 32)
    cycles = len(access_phases(target, 4, "read")[1])
    packing = 0 if len(plan.sent[0][0]) == 1 else len(plan.sent) * len(plan.rounds)
    return words * (plan.shuffles * cycles + (plan.selects + packing) * SELECT_CYCLES[target])


def _shared_plan(source: LinearLayout, result: LinearLayout, bits: int, target: str, limit: int) -> ConversionPlan:
    exchange = plan_exchange(source, result, bits, target, limit)
    if exchange is None:
        whole = _whole(source, result, bits, target)
        cost = _whole_cycles(source, result, whole, target) + 2 * BARRIER_CYCLES
        return ConversionPlan("shared", cost, whole=whole)
    return ConversionPlan("shared", exchange.cycles + 2 * BARRIER_CYCLES * len(exchange.writes), exchange=exchange)


def _whole(source: LinearLayout, result: LinearLayout, bits: int, target: str) -> SharedLayout:
    shape = source.tile_shape
    orders = list(permutations(range(len(shape)))) if len(shape) <= 3 else [tuple(reversed(range(len(shape))))]
    writers, readers = [(source, 16)], [(result, 16)]
    best = [
        choose_shared_layout(shape, bits, o, readers, writers, target, shared_candidates(shape, bits, o, target))
        for o in orders
    ]
    return min(best, key=lambda layout: _whole_cycles(source, result, layout, target))


def _whole_cycles(source: LinearLayout, result: LinearLayout, layout: SharedLayout, target: str) -> int:
    return shared_cycles(source, layout, 16, target, "write") + shared_cycles(result, layout, 16, target, "read")


__all__ = ["ConversionPlan", "conversion_cost", "plan_conversion"]
