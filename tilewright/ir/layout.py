"""Tile layouts: the one import for `LinearLayout`, fragment constructors and shared-memory layouts."""

from tilewright.ir.layout_access import access_cost, near_coalesced
from tilewright.ir.layout_convert import ConversionPlan, conversion_cost, plan_conversion
from tilewright.ir.layout_exchange import ExchangeLayout, ExchangePlan
from tilewright.ir.layout_fragments import (
    blocked,
    fma_accumulator,
    fma_operand_a,
    fma_operand_b,
    mfma_accumulator,
    mfma_operand,
    mma_sync_accumulator,
    mma_sync_operand_a,
    mma_sync_operand_b,
    wgmma_accumulator,
    wgmma_operand_a,
)
from tilewright.ir.layout_linear import LayoutInverse, LinearLayout
from tilewright.ir.layout_shared import (
    SharedLayout,
    bank_conflicts,
    choose_shared_layout,
    shared_candidates,
    shared_cycles,
    shared_vector_bytes,
)
from tilewright.ir.layout_shuffle import ShufflePlan

__all__ = [
    "ConversionPlan",
    "ExchangeLayout",
    "ExchangePlan",
    "LayoutInverse",
    "LinearLayout",
    "SharedLayout",
    "ShufflePlan",
    "access_cost",
    "bank_conflicts",
    "blocked",
    "choose_shared_layout",
    "conversion_cost",
    "fma_accumulator",
    "fma_operand_a",
    "fma_operand_b",
    "mfma_accumulator",
    "mfma_operand",
    "mma_sync_accumulator",
    "mma_sync_operand_a",
    "mma_sync_operand_b",
    "near_coalesced",
    "plan_conversion",
    "shared_candidates",
    "shared_cycles",
    "shared_vector_bytes",
    "wgmma_accumulator",
    "wgmma_operand_a",
]
