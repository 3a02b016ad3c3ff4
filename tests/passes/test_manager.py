"""The pass manager: pipeline text, typed arguments, instruments and failures."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Literal

import pytest

from tilewright.ir.builder import Builder
from tilewright.ir.core import Block, Function, IRError, Location, Module, Region
from tilewright.ir.target import get_target
from tilewright.ir.tile_ops import Binary
from tilewright.ir.types import f32, i32
from tilewright.passes import manager
from tilewright.passes.manager import (
    Collect,
    Dump,
    Instrument,
    Pass,
    PassContext,
    PassError,
    PassManager,
    PassOptions,
    PipelineError,
    Timing,
    make_pass,
    parse_pipeline,
    pipeline_text,
    register_pass,
)

CONTEXT = PassContext(get_target("sm_90a"), PassOptions(num_stages=4))


@pytest.fixture(autouse=True)
def passes(monkeypatch):
    """Register the passes of this file in a registry of their own."""
    monkeypatch.setattr(manager, "PASSES", {})

    @register_pass("nothing")
    class Nothing(Pass):
        def run(self, module, context):
            pass

    @register_pass("typed")
    class Typed(Pass):
        num_stages: int | None = None
        factor: float = 1.0
        fast: bool = False
        order: tuple[int, ...] = ()
        label: str = "x"
        mode: Literal["a", "b"] = "a"

        def run(self, module, context):
            pass

    @register_pass("needs-count")
    class NeedsCount(Pass):
        count: int

        def run(self, module, context):
            if self.count < 0:
                module.functions[0].body.block.ops.pop(0)
                raise IRError("too few", Location("k.py", 3, 7), "use more")
            for _ in range(self.count):
                Builder(module.functions[0].body.block).index(7)

    @register_pass("crash")
    class Crash(Pass):
        def run(self, module, context):
            module.functions[0].body.block.ops.clear()
            raise KeyError("oops")

    @register_pass("breaks")
    class Breaks(Pass):
        def run(self, module, context):
            block = module.functions[0].body.block
            a, b = Builder(block).constant(1, i32), Builder(block).constant(1.0, f32)
            block.append(Binary(a, b, types=[a.type], fn="add", loc=Location("k.py", 9, 1)))

    return manager.PASSES


def module() -> Module:
    block = Block()
    Builder(block).index(1)
    return Module([Function("kernel", Region(block))])


def test_pipelines_have_a_text_form():
    passes = parse_pipeline("nothing, typed{num-stages=4 fast=true, order=[2,0,1]},needs-count{count=3}")
    assert [p.name for p in passes] == ["nothing", "typed", "needs-count"]
    assert passes[1].num_stages == 4 and passes[1].fast is True and passes[1].order == (2, 0, 1)
    assert pipeline_text(passes) == "nothing,typed{num-stages=4 fast=true order=[2,0,1]},needs-count{count=3}"
    assert parse_pipeline(pipeline_text(passes)) == passes


@pytest.mark.parametrize("label", ["plain", "two words", 'a "quoted" one', "back\\slash", "", "a,b{c}[d]=e", "none"])
def test_strings_survive_the_text_form(label):
    passes = [make_pass("typed", label=label), make_pass("typed", factor=0.5, mode="b")]
    assert parse_pipeline(pipeline_text(passes)) == passes


def test_the_empty_pipeline_has_no_passes():
    assert parse_pipeline("") == [] and pipeline_text([]) == ""


def test_passes_are_frozen_dataclasses():
    with pytest.raises(FrozenInstanceError):
        make_pass("typed").factor = 2.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothin", "unknown pass 'nothin'; did you mean 'nothing'?"),
        ("typed{num-stage=4}", "no argument 'num-stage'; did you mean 'num-stages'?"),
        ("nothing{a=1}", "arguments: none"),
        ("typed{num-stages=four}", "num-stages=four is not of type int or none"),
        ("typed{fast=1}", "fast=1 is not of type bool"),
        ("typed{mode=c}", "mode=c is not of type one of a, b"),
        ("typed{order=3}", r"order=3 is not of type \[int, ...\]"),
        ("typed{fast=true fast=true}", "given twice"),
        ("typed{fast}", "expected argument=value"),
        ("typed{fast=true", "unclosed"),
        ("typed}", "unexpected"),
        ("needs-count", "needs count"),
    ],
)
def test_wrong_pipelines_say_what_is_wrong(text, message):
    with pytest.raises(PipelineError, match=message):
        parse_pipeline(text)


def test_two_passes_cannot_share_a_name():
    with pytest.raises(ValueError, match="two passes are called 'nothing'"):

        @register_pass("nothing")
        class Other(Pass):
            def run(self, module, context):
                pass


def test_passes_run_in_order_on_the_module_given():
    m = module()
    assert PassManager("needs-count{count=1},needs-count{count=2}", CONTEXT).run(m) is m
    assert len(m.functions[0].body.block.ops) == 4


def test_dump_writes_a_numbered_file_for_each_pass(tmp_path):
    PassManager("nothing,needs-count{count=1}", CONTEXT, [Dump(tmp_path / "dump")]).run(module())
    files = sorted((tmp_path / "dump").iterdir())
    assert [f.name for f in files] == ["00-input.tw", "01-nothing.tw", "02-needs-count.tw"]
    assert "value = 7" in files[2].read_text() and "value = 7" not in files[1].read_text()


def test_timing_and_collect_report_by_pass_name():
    timing, collect = Timing(), Collect()
    PassManager("nothing,needs-count{count=1},nothing", CONTEXT, [timing, collect]).run(module())
    assert [name for name, _ in timing.entries] == ["nothing", "needs-count", "nothing"]
    assert timing.report().splitlines()[-1].endswith("total")
    assert list(collect.texts) == ["input", "nothing", "needs-count", "nothing.2"]
    assert collect.texts["nothing.2"] == collect.texts["needs-count"] != collect.texts["input"]


def test_an_exception_names_the_pass_and_keeps_the_ir_it_was_given():
    with pytest.raises(PassError, match="pass 'crash' failed on kernel 'kernel': KeyError: 'oops'") as caught:
        PassManager("nothing,crash", CONTEXT).run(module())
    error = caught.value
    assert (error.pass_name, error.kernel) == ("crash", "kernel") and isinstance(error.original, KeyError)
    assert "tile.constant" in error.ir_before
    assert error.reproducer.startswith("// RUN: opt -p crash\n")


def test_ir_errors_keep_location_and_hint():
    with pytest.raises(PassError) as caught:
        PassManager("needs-count{count=-1}", CONTEXT).run(module())
    assert caught.value.loc == Location("k.py", 3, 7) and caught.value.hint == "use more"
    assert str(caught.value).startswith("k.py:3:7: pass 'needs-count' failed on kernel 'kernel': too few")
    assert "-p needs-count{count=-1}" in caught.value.reproducer


def test_invalid_ir_is_found_after_the_pass_that_made_it(tmp_path):
    with pytest.raises(PassError, match="pass 'breaks' left invalid IR on kernel 'kernel'") as caught:
        PassManager("nothing,breaks,nothing", CONTEXT, [Dump(tmp_path)]).run(module())
    assert caught.value.loc == Location("k.py", 9, 1)
    assert (tmp_path / "02-breaks.tw").exists(), "the invalid module is dumped before it is refused"
    PassManager("nothing,breaks", CONTEXT, verify=False).run(module())


def test_a_dump_that_cannot_be_written_is_no_pass_error():
    class Full(Instrument):
        def after_pass(self, event):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        PassManager("nothing", CONTEXT, [Full()]).run(module())
