"""The copy engine takes tiles whose lines begin at multiples of 16 bytes; others are said to stop a GPU."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from products import product_behind

import tilewright as tw
from tilewright.frontend.build import build_module
from tilewright.ir.target import get_target
from tilewright.ir.tile_ops import Load
from tilewright.ir.types import DTYPES, ScalarType, ViewType
from tilewright.passes.manager import PassContext, PassManager
from tilewright.passes.pipelines import default_pipeline


@tw.kernel
def moved(a: tw.Tensor, b: tw.Tensor, c: tw.Tensor, start: tw.int32, *, WAY: tw.constexpr, BY: tw.constexpr):
    """The columns of ``a`` that are multiplied begin at a number known in some way to be a multiple of ``BY``."""
    m, first = tw.program_id(0), 0
    if WAY == "constant":
        first = 3 * BY
    if WAY == "promised":
        tw.assume((start + 1) % BY == 0)
        first = m * (start + 1)
    if WAY == "promised elsewhere":
        if m > 0:
            tw.assume(start % BY == 0)
        first = start
    if WAY == "computed":
        first = tw.maximum(start * (3 * BY), 256) % (m * 16) - BY * (start // 2)
    acc = tw.zeros((64, 64), tw.float32)
    for k in tw.range(0, a.shape[0], BY):
        if WAY == "counted":
            first = k
        if WAY == "chosen":
            first = tw.where(m > 0, k, start * BY)
        acc = tw.dot(tw.load(a.offset(1, first).T, (m, 1), (64, 32)), tw.load(b.offset(k, 0), (0, 0), (32, 64)), acc)
    tw.store(c, (m, 0), acc.to(c.dtype))


def engines(way: str, by: int) -> list[str]:
    """Who copies ``a`` and ``b``."""
    view = ViewType((None, None), DTYPES["bf16"], (None, 1), 16)
    types = {"a": view, "b": view, "c": view, "start": ScalarType(DTYPES["i32"]), "WAY": way, "BY": by}
    module, target = build_module(moved.definition, types), get_target("sm_90a")
    early = default_pipeline(target).split("placement")[0] + "placement"
    PassManager(early, PassContext(target)).run(module)
    return [op.engine for op in module.walk() if isinstance(op, Load)]


@pytest.mark.parametrize("way", ["constant", "promised", "computed", "counted", "chosen"])
def test_the_copy_engine_begins_at_16_bytes(way: str) -> None:
    assert [engines(way, by) for by in (8, 4)] == [["tma", "tma"], ["threads", "tma"]]


def test_a_promise_holds_where_it_is_made() -> None:
    assert engines("promised elsewhere", 8) == ["threads", "tma"]


def test_products_begin_and_end_anywhere() -> None:
    """The emulator refuses copies that begin within 16 bytes, and those to an end within, behind which GPUs go on."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in ((64, 72), (64, 64)))
    whole = np.full((64, 64), np.nan, np.float32)
    tw.device("emulate:sm_90a").launch(product_behind, (1,), a, b, whole[:, :61], 36)
    np.testing.assert_allclose(whole[:, :61], a[:, 36:].astype(np.float64) @ b[:36, :61].astype(np.float64), 1e-5, 1e-5)
    assert np.isnan(whole[:, 61:]).all()
