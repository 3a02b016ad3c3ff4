"""Register layouts for joining and cutting tiles: the parts and the whole are copies of one core.

Equal parts in any layout join to one in which further registers say which part (`joined`), and go apart again
(`part_of`): so the layout of neighbours passes through. Else parts and whole have layouts of their own, made here.
Their core is as long as the largest power of two that divides every part, so that each copy belongs to one part and
joining renames registers; so does cutting at offsets that the core divides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from tilewright.ir.layout import LinearLayout, blocked
from tilewright.ir.layout_bits import is_power_of_two, power_of_two_part, unit


@dataclass(frozen=True)
class CatLayouts:
    """``sources``: the layout of each part; ``result``: that of the whole."""

    sources: tuple[LinearLayout, ...]
    result: LinearLayout


def joined(layout: LinearLayout, axis: int, parts: int) -> LinearLayout | None:
    """The layout of ``parts`` tiles of this layout one behind the other; None where it is no linear map."""
    size = layout.shape[axis]
    if not is_power_of_two(parts) or layout.repeat[axis] > 1:
        return None
    which = [unit(layout.rank, axis, size << bit) for bit in range(parts.bit_length() - 1)]
    bases = {dim: list(layout.basis(dim)) for dim in ("register", "lane", "warp")}
    bases["register"] = [*which, *bases["register"]]
    shape = [n * parts if position == axis else n for position, n in enumerate(layout.shape)]
    return LinearLayout.make(bases, shape, layout.repeat, layout.repeat_order)


def part_of(layout: LinearLayout, axis: int, parts: int) -> LinearLayout | None:
    """The layout whose `joined` has the same elements in the same threads; None where there is none."""
    if not is_power_of_two(parts):
        return None
    sizes = [n // parts if position == axis else n for position, n in enumerate(layout.tile_shape)]
    try:
        part = layout.extract([0] * layout.rank, sizes)[0]
    except ValueError:
        return None
    whole = joined(part, axis, parts)
    return part if whole is not None and whole.register_permutation(layout) is not None else None


def cat_layouts(
    shape: Sequence[int], axis: int, sizes: Sequence[int], element_bits: int, warps: int, warp_size: int
) -> CatLayouts:
    """Layouts for a tile of ``shape`` made of parts with ``sizes`` along ``axis``."""
    length = power_of_two_part(gcd(*sizes))
    core = [length if position == axis else size for position, size in enumerate(shape)]
    order = tuple(reversed(range(len(shape))))
    base = blocked(core, element_bits, warps, warp_size, order)

    def repeated(size: int) -> LinearLayout:
        repeat = [size // length if position == axis else count for position, count in enumerate(base.repeat)]
        return LinearLayout.make(dict(base.bases), base.shape, repeat)

    return CatLayouts(tuple(repeated(size) for size in sizes), repeated(sum(sizes)))


def part_layouts(
    shape: Sequence[int],
    offsets: Sequence[int],
    sizes: Sequence[int],
    element_bits: int,
    warps: int,
    warp_size: int,
) -> tuple[LinearLayout, LinearLayout]:
    """Layouts for a tile of ``shape`` and for its part at ``offsets``."""
    core = [power_of_two_part(gcd(*axis)) for axis in zip(shape, offsets, sizes, strict=True)]
    base = blocked(core, element_bits, warps, warp_size, tuple(reversed(range(len(shape)))))

    def repeated(whole: Sequence[int]) -> LinearLayout:
        return LinearLayout.make(dict(base.bases), base.shape, [n // c for n, c in zip(whole, core, strict=True)])

    return repeated(shape), repeated(sizes)
