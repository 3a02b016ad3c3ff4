"""Run-time control flow: ``for``, ``while``, ``if`` and conditional expressions."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tilewright.frontend.errors import CompileError
from tilewright.frontend.liveness import stores
from tilewright.frontend.merging import (
    Variable,
    is_put,
    leaves,
    loop_index,
    loop_only,
    merged_type,
    one_branch_only,
    rebuild,
    same_structure,
)
from tilewright.frontend.scope import name_value
from tilewright.frontend.statements import Statements
from tilewright.frontend.values import RangeValue, Undefined, ViewShape, describe, dtype_of, is_scalar
from tilewright.ir.core import Block, Value
from tilewright.ir.tile_ops import For, If, Yield
from tilewright.ir.types import DType, Type, i32, i64

_MISSING = Undefined("", "")
#: what a branch returns, beside its variables
_RESULT = "the returned value"


class Control(Statements):
    """Structured control flow: loops carry what is live and assigned, branches merge it."""

    @contextmanager
    def region(self, block: Block) -> Iterator[None]:
        """Build inside a region; assignments made there are dropped at its end."""
        saved, self.frame.locals = self.frame.locals, dict(self.frame.locals)
        self.frame.depth += 1
        try:
            with self.builder.at(block):
                yield
        finally:
            self.frame.depth -= 1
            self.frame.locals = saved

    # --- branches -------------------------------------------------------------------------------------

    def visit_If(self, node: ast.If) -> None:
        with self.at_node(node.test):
            condition = self.emit.truth(self.visit(node.test), "the condition of 'if'")
        if isinstance(condition, bool):
            self.visit_block(node.body if condition else node.orelse)
            return
        live = self.frame.definition.liveness.after[node]
        names = stores([*node.body, *node.orelse])
        op = self.builder.if_else(condition)
        outcomes = [self._branch(block, body, names) for block, body in self._bodies(op, node)]
        merging = [n for n in names if n in live]
        if any(_RESULT in outcome for outcome in outcomes):
            merging, outcomes = [_RESULT], [{_RESULT: None} | outcome for outcome in outcomes]
        merged = self._merge(op, {n: (outcomes[0][n], outcomes[1][n]) for n in merging}, node.lineno)
        if _RESULT in merging:  # nothing follows: see `returns`
            self.frame.returned, self.frame.result = True, merged[_RESULT]
        for name in names:
            self.frame.locals[name] = merged.get(name, one_branch_only(name, node.lineno))

    def _bodies(self, op: If, node: ast.If) -> list[tuple[Block, list[ast.stmt]]]:
        return [(op.then_body.block, node.body), (op.else_body.block, node.orelse)]

    def _branch(self, block: Block, body: Sequence[ast.stmt], names: Sequence[str]) -> dict[str, Any]:
        """The values of ``names`` at the end of a branch, and what it returns if it does."""
        with self.region(block):
            self.visit_block(body)
            result = {_RESULT: self.frame.result} if self.frame.returned else {}
            self.frame.returned, self.frame.result = False, None
            return {name: self.frame.locals.get(name, _MISSING) for name in names} | result

    def _merge(self, op: If, outcomes: dict[str, tuple[Any, Any]], line: int) -> dict[str, Any]:
        """Yield what differs from both branches; the value of each name afterwards."""
        merged: dict[str, Any] = {}
        plans: list[tuple[str, Any, Any, list[Type | None]]] = []
        for name, (a, b) in outcomes.items():
            if (is_put(a) or is_put(b)) and not (is_put(a) and is_put(b)):
                a, b = self._joined(op, a, b)
            if isinstance(a, Undefined) or isinstance(b, Undefined):
                merged[name] = a if isinstance(a, Undefined) and a.reason else one_branch_only(name, line)
            elif not same_structure(a, b):
                message = f"'{name}' has different types in the two branches: {describe(a)} and {describe(b)}"
                raise CompileError(message, hint="give both tuples the same number of items")
            else:
                types = [merged_type(name, x, y) for x, y in zip(leaves(a), leaves(b), strict=True)]
                plans.append((name, a, b, types))
        for side, block in enumerate((op.then_body.block, op.else_body.block)):
            with self.builder.at(block):
                self.builder.yield_(self._yielded(plans, side))
        op.results = [Value(type_, op, name) for name, _, _, types in plans for type_ in types if type_ is not None]
        results = iter(op.results)
        for name, a, _, types in plans:
            items = [leaf if t is None else next(results) for leaf, t in zip(leaves(a), types, strict=True)]
            merged[name] = rebuild(a, iter(items))
        return merged

    def _joined(self, op: If, a: Any, b: Any) -> tuple[Any, Any]:
        """Puts in one branch alone: the other has a token of none."""
        if is_put(a) and isinstance(b, Undefined):
            with self.builder.at(op.else_body.block):
                return a, self.builder.join()
        if is_put(b) and isinstance(a, Undefined):
            with self.builder.at(op.then_body.block):
                return self.builder.join(), b
        return a, b

    def _yielded(self, plans: Sequence[tuple[str, Any, Any, list[Type | None]]], side: int) -> list[Value]:
        values = []
        for _, a, b, types in plans:
            for leaf, type_ in zip(leaves((a, b)[side]), types, strict=True):
                if type_ is not None:
                    values.append(self.constant_leaf(leaf, type_))
        return values

    def constant_leaf(self, leaf: Any, type_: Type) -> Value:
        """A leaf as a run-time value of the type agreed on."""
        return leaf if isinstance(leaf, Value) else self.emit.constant(leaf, type_)

    def choose(self, condition: Value, on_true: ast.expr, on_false: ast.expr) -> Any:
        """``a if c else b`` at run time: a select where both sides are at hand, else a `tile.if`."""
        op = self.builder.if_else(condition)
        values = []
        for block, expression in ((op.then_body.block, on_true), (op.else_body.block, on_false)):
            with self.region(block):
                values.append(self.visit(expression))
        if self._is_cheap(op) and all(is_scalar(v) for v in values):
            return self._select(op, condition, values)
        name = "the conditional expression"
        return self._merge(op, {name: (values[0], values[1])}, 0)[name]

    def _is_cheap(self, op: If) -> bool:
        return not op.then_body.block.ops and not op.else_body.block.ops

    def _select(self, op: If, condition: Value, values: list[Any]) -> Any:
        type_ = merged_type("the conditional expression", *values)
        assert self.builder.block.ops[-1] is op
        self.builder.block.ops.pop()
        if type_ is None:
            return values[0]
        return self.builder.select(condition, *(self.constant_leaf(v, type_) for v in values))

    # --- loops ----------------------------------------------------------------------------------------

    def visit_For(self, node: ast.For) -> None:
        self._no_else(node)
        iterable = self.visit(node.iter)
        if isinstance(iterable, ViewShape):
            iterable = self.emit.plain(iterable)
        if isinstance(iterable, RangeValue) and not iterable.unrolled:
            with self.at_node(node.iter):
                bounds = self._bounds(iterable)
            self._for(node, bounds)
        elif isinstance(iterable, RangeValue):
            self._unroll(node, range(iterable.start, iterable.stop, iterable.step))
        elif isinstance(iterable, tuple):
            self._unroll(node, iterable)
        else:
            hint = "loop over tw.range, range, tw.static_range or a tuple"
            raise self.error_at(node.iter, f"cannot loop over {describe(iterable)}", hint)

    def _unroll(self, node: ast.For, items: Sequence[Any]) -> None:
        for item in items:
            if self.frame.returned:
                return
            self.bind(node.target, item)
            self.visit_block(node.body)

    def _for(self, node: ast.For, bounds: list[Value]) -> None:
        if not isinstance(node.target, ast.Name):
            raise self.error_at(node.target, "the variable of a run-time loop is a single name")
        index = node.target.id
        variables = self._carried(node, exclude=index)
        inits = self._inits(variables)
        hints = [index, *(h for v in variables for h in v.hints)]
        op = self.builder.for_loop(bounds[0], bounds[1], bounds[2], inits, hints)
        with self.region(op.body.block):
            self.frame.locals[index] = op.index
            self._enter(variables, op.carried)
            self.visit_block(node.body)
            puts = self._puts(node, variables)
            self._yield(node, variables, inits)
        self._leave(node, variables, op)
        for name, token in puts.items():
            self.frame.locals[name] = self._collect(op, name, token)
        self.frame.locals[index] = loop_index(index, node.lineno)

    def _puts(self, node: ast.For, variables: Sequence[Variable]) -> dict[str, Value]:
        """Variables that end an iteration as tokens of its puts, and that no earlier iteration reaches."""
        head, carried = self.frame.definition.liveness.head[node], {v.name for v in variables}
        values = {n: self.frame.locals.get(n) for n in stores(node.body) if n in head and n not in carried}
        tokens = {name: leaves(value) for name, value in values.items()}
        puts = {n: all(isinstance(t, Value) and is_put(t) for t in items) for n, items in tokens.items() if items}
        return {n: tokens[n][0] if len(tokens[n]) == 1 else self.builder.join(tokens[n]) for n in puts if puts[n]}

    def _collect(self, loop: For, name: str, token: Value) -> Value:
        """The token of the puts of all iterations."""
        outer, body = self.builder.block, loop.body.block
        with self.builder.at(outer, outer.ops.index(loop)):
            none = self.builder.join()
        loop.inits = [*loop.inits, none]
        loop.results.append(Value(none.type, loop, name))
        before = Value(none.type, body, name)
        body.args.append(before)
        terminator = body.terminator
        assert isinstance(terminator, Yield)
        with self.builder.at(body, len(body.ops) - 1):
            terminator.values = [*terminator.values, self.builder.join([before, token])]
        return loop.results[-1]

    def _bounds(self, bounds: RangeValue) -> list[Value]:
        """Start, stop and step as scalars of one type: i32, or i64 if one of them is."""
        items = [bounds.start, bounds.stop, bounds.step]
        for item, what in zip(items, ("start", "stop", "step"), strict=True):
            if not _is_integer(item):
                raise CompileError(f"the {what} of a range must be an integer, got {describe(item)}", hint="use '//'")
        if isinstance(bounds.step, int) and bounds.step <= 0:
            hint = "count up and compute the index: hi - 1 - i"
            raise CompileError(f"the step of a run-time range must be positive, got {bounds.step}", hint=hint)
        wide = any(isinstance(v, Value) and dtype_of(v) == i64 for v in items)
        dtype: DType = i64 if wide else i32
        return [self.emit.conform(item, dtype, ()) for item in items]

    def visit_While(self, node: ast.While) -> None:
        self._no_else(node)
        variables = self._carried(node)
        inits = self._inits(variables)
        op = self.builder.while_loop(inits, [h for v in variables for h in v.hints])
        with self.region(op.condition.block):
            self._enter(variables, op.condition.block.args)
            with self.at_node(node.test):
                condition = self.emit.truth(self.visit(node.test), "the condition of 'while'")
            if isinstance(condition, Value):
                self.builder.yield_([condition])
        if isinstance(condition, bool):
            if condition:
                raise self.error_at(node.test, "this 'while' never ends", "its condition is known at compile time")
            self.builder.block.ops.remove(op)
            return
        with self.region(op.body.block):
            self._enter(variables, op.body.block.args)
            self.visit_block(node.body)
            self._yield(node, variables, inits)
        self._leave(node, variables, op)

    def _no_else(self, node: ast.For | ast.While) -> None:
        if node.orelse:
            raise self.error_at(node.orelse[0], "'else' of a loop is not supported", "there is no 'break' to guard")

    def _carried(self, node: ast.For | ast.While, exclude: str = "") -> list[Variable]:
        """Variables assigned in the body that have a value before it and are read in a later iteration or after."""
        head, variables = self.frame.definition.liveness.head[node], []
        for name in stores(node.body):
            value = self.frame.locals.get(name, _MISSING)
            if name in head and name != exclude and not isinstance(value, Undefined):
                variables.append(Variable(name, self.emit.plain(value)))
        return variables

    def _inits(self, variables: Sequence[Variable]) -> list[Value]:
        """The values that loop-carried variables start with."""
        inits = []
        for variable in variables:
            for name, leaf in zip(variable.hints, variable.runtime, strict=True):
                inits.append(self.emit.materialise(leaf))
                name_value(name, inits[-1])
        return inits

    def _enter(self, variables: Sequence[Variable], args: Sequence[Value]) -> None:
        values = iter(args)
        for variable in variables:
            self.frame.locals[variable.name] = variable.with_values(values)

    def _yield(self, node: ast.For | ast.While, variables: Sequence[Variable], inits: Sequence[Value]) -> None:
        expected, values = iter(inits), []
        for variable in variables:
            with self.at_node(_last_assignment(node.body, variable.name) or node):
                after = self.emit.plain(self.frame.locals[variable.name])
                if isinstance(after, Undefined):
                    raise CompileError(after.reason, hint=after.hint)
                values += variable.next_values(after, expected, self.constant_leaf)
        self.builder.yield_(values)

    def _leave(self, node: ast.For | ast.While, variables: Sequence[Variable], op: For | Any) -> None:
        for name in stores(node.body):
            self.frame.locals[name] = loop_only(name, node.lineno)
        self._enter(variables, op.results)

    @contextmanager
    def at_node(self, node: ast.AST) -> Iterator[None]:
        """Errors without a place point at ``node``."""
        try:
            yield
        except CompileError as error:
            error.locate(self.location(node), self.length(node))
            raise


def _is_integer(value: Any) -> bool:
    if isinstance(value, Value):
        return is_scalar(value) and dtype_of(value).is_int
    return isinstance(value, int) and not isinstance(value, bool)


def _last_assignment(body: Sequence[ast.stmt], name: str) -> ast.stmt | None:
    """The last simple statement that assigns a variable."""
    found: ast.stmt | None = None
    simple = (ast.Assign, ast.AugAssign, ast.AnnAssign)
    for statement in (n for top in body for n in ast.walk(top) if isinstance(n, simple)):
        if name in stores([statement]) and (found is None or statement.lineno >= found.lineno):
            found = statement
    return found


__all__ = ["Control"]
