"""The public surface of the language, as markers.

Nothing here computes: the frontend recognises these objects in the program's globals (under any
alias) and builds operations. The implementations are in ``tilewright.frontend.builtins``.
Signatures below are what a kernel may write; the docstrings are the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tilewright.frontend.definition import FunctionDefinition, function
from tilewright.frontend.errors import ArgumentError
from tilewright.frontend.markers import Builtin, Symmetric, TensorSpec, as_dtype, row_major_strides
from tilewright.frontend.markers import builtin as _builtin
from tilewright.ir.types import DType, bf16, f8e4m3, f8e5m2, f16, f32, f64, i1, i8, i16, i32, i64

if TYPE_CHECKING:  # annotations of kernels read as "anything" to a type checker
    Tensor = Any
    constexpr = Any
else:
    from tilewright.frontend.markers import Tensor, constexpr

int8, int16, int32, int64 = i8, i16, i32, i64
float16, bfloat16, float32, float64 = f16, bf16, f32, f64
float8_e4m3, float8_e5m2 = f8e4m3, f8e5m2
bool_ = i1


def spec(
    dtype: DType | str,
    shape: Sequence[int | str],
    strides: Sequence[int | str | None] | None = None,
    align: int | None = None,
) -> TensorSpec:
    """Describe a tensor argument for `tw.compile`.

    ``shape``: ints, or names for dimensions known at run time. ``strides`` count elements and
    default to row-major; a name or None is known at run time. ``align`` (bytes): the address and
    every run-time stride are multiples of it; a launch checks that they are. Without it the binary
    serves every alignment: it has a fast entry for multiples of 16 bytes and a general one.
    Raises ArgumentError.
    """
    if isinstance(shape, int | str):
        raise ArgumentError(f"spec: the shape {shape!r} is no tuple", hint=f"write ({shape!r},)")
    for size in shape:
        fits = size.isidentifier() if isinstance(size, str) else type(size) is int and size >= 0
        if not fits:
            raise ArgumentError(f"spec: {size!r} is no size", hint='a dimension is an integer or a name: (64, "N")')
    if align is not None and (not isinstance(align, int) or align < 1 or align & (align - 1)):
        raise ArgumentError(f"spec: align={align!r} is no power of two", hint="it counts bytes, as in align=16")
    known = tuple(n if isinstance(n, int) else None for n in shape)
    given = row_major_strides(known) if strides is None else strides
    steps = tuple(s if isinstance(s, int) else None for s in given)
    if len(steps) != len(known):
        raise ArgumentError(f"spec: {len(steps)} strides for {len(known)} dimensions")
    try:
        return TensorSpec(as_dtype(dtype), tuple(shape), steps, align)
    except ValueError as error:
        raise ArgumentError(f"spec: {error}") from None


# --- the grid -----------------------------------------------------------------------------------


@_builtin
def program_id(axis):
    """The index of this program along a grid axis 0, 1 or 2 (int32)."""


@_builtin
def num_programs(axis):
    """The number of programs along a grid axis (int32)."""


# --- memory -------------------------------------------------------------------------------------


@_builtin
def load(view, index, shape=None, pad=0, after=None, eviction_policy=None):
    """Read the tile of ``shape`` at ``index``, counted in tiles. Parts outside the tensor read as ``pad``.

    ``after``: a token of `wait` or a tuple of them, for what other ranks have written. ``eviction_policy``: a hint to
    the caches, "evict_first" for what nobody reads again, "evict_last" for what is read often.

    A rank-one view takes a single number for ``index`` and ``shape``. Without ``shape`` one element is read, as a
    scalar: addresses, bounds and conditions may depend on it.
    """


@_builtin
def store(view, index, value, eviction_policy=None):
    """Write a tile at ``index``, counted in tiles; parts outside the tensor are dropped.

    The value's dtype must be the tensor's. A scalar is a tile of one element. ``eviction_policy``: as for `load`.
    """


# --- integer tiles as indices ---------------------------------------------------------------------


@_builtin
def gather(view, index, axis=None, tile=None, shape=None, pad=0, after=None):
    """Read the elements that an integer tile names along an axis; out-of-range ones (negative too) read as ``pad``.

    - ``index`` of the view's rank: ``result[c] = view[c, but index[c] along axis]``, NumPy's take_along_axis.
    - ``index`` of rank one: NumPy's take. Along ``axis`` it names rows; along the other axes the result covers the
      view's sizes, or with ``shape`` and ``tile`` the tile at that tile index, as `load` counts them:
      ``tw.gather(x, rows, axis=0, tile=(0, j), shape=(N, 64))``.
    - A tuple of tiles for a tuple of axes (by default the leading ones) gives a coordinate for each; where all axes
      have one the tiles may have any rank and the result has their broadcast shape: ``view[rows, columns]``.

    ``shape`` is the result's, which the index broadcasts to; ``tile`` has an entry for each axis, 0 along ``axis``.
    ``after`` is as for `load`.
    """


@_builtin
def scatter(view, index, value, axis=None, tile=None):
    """Write a tile to the places that `gather` with the same arguments reads; out-of-range elements are dropped.

    ``value`` broadcasts with ``index``. Of several elements for one place any one is written.
    """


@_builtin
def atomic_add(view, index, value, axis=None, tile=None, order="relaxed"):
    """Add to the tensor atomically and give the old values; the other ``atomic_*`` functions likewise.

    ``index`` is a tile index as for `store`, or integer tiles as for `scatter` (then with ``axis`` and ``tile``).
    Device scope. Elements out of range are dropped and give 0. A scalar at a tile index gives a scalar.
    int32, int64, float16, bfloat16, float32, float64. The order of updates, and with it the rounding, may change
    from run to run.

    ``order="acq_rel"`` makes the update a meeting point of programs: what a program has written before its update
    can be read by every program whose ordered update of the same place comes later, behind that update. So the last
    of n programs to arrive at a counter may read what all have stored. "relaxed" orders nothing but the place itself.
    """


@_builtin
def atomic_max(view, index, value, axis=None, tile=None, order="relaxed"):
    """The larger of old and new, for int32, int64, float32, float64. A NaN in ``value`` wins."""


@_builtin
def atomic_min(view, index, value, axis=None, tile=None, order="relaxed"):
    """The smaller of old and new, for int32, int64, float32, float64. A NaN in ``value`` wins."""


@_builtin
def atomic_and(view, index, value, axis=None, tile=None, order="relaxed"):
    """Bitwise and, for int32 and int64."""


@_builtin
def atomic_or(view, index, value, axis=None, tile=None, order="relaxed"):
    """Bitwise or, for int32 and int64."""


@_builtin
def atomic_xor(view, index, value, axis=None, tile=None, order="relaxed"):
    """Bitwise exclusive or, for int32 and int64."""


@_builtin
def atomic_exchange(view, index, value, axis=None, tile=None, order="relaxed"):
    """Write the new value, for int32, int64, float32, float64."""


@_builtin
def atomic_cas(view, index, expected, value, axis=None, tile=None, order="relaxed"):
    """Write the new value where the old one has the bits of ``expected``; int32, int64, float32, float64."""


# --- making tiles -------------------------------------------------------------------------------


@_builtin
def zeros(shape, dtype=f32):
    """A tile of zeros."""


@_builtin
def full(shape, value, dtype=None):
    """A tile with ``value`` in every element. Without ``dtype``: that of the value (float32, int32 or bool)."""


@_builtin
def arange(start, end=None, dtype=i32):
    """``start, start + 1, ..., end - 1`` as a rank-one tile; ``arange(n)`` counts from zero. Any size."""


@_builtin
def broadcast_to(x, shape):
    """``x`` repeated to ``shape`` by NumPy's broadcasting rules."""


@_builtin
def cast(x, dtype):
    """``x.to(dtype)``: round to nearest even to floats, truncate to integers, compare with zero to bool."""


@_builtin
def bitcast(x, dtype):
    """The same bits as another dtype of the same width."""


# --- elementwise ---------------------------------------------------------------------------------


@_builtin
def where(condition, x, y):
    """``x`` where the condition holds, else ``y``; all three broadcast."""


@_builtin
def maximum(x, y):
    """The larger of two, elementwise; NaN if either is NaN."""


@_builtin
def minimum(x, y):
    """The smaller of two, elementwise; NaN if either is NaN."""


@_builtin
def exp(x):
    """e to the power x. Integers become float32; so for all functions below."""


@_builtin
def exp2(x):
    """2 to the power x."""


@_builtin
def log(x):
    """Natural logarithm."""


@_builtin
def log2(x):
    """Logarithm to base 2."""


@_builtin
def sqrt(x):
    """Square root."""


@_builtin
def rsqrt(x):
    """1 / sqrt(x)."""


@_builtin
def sin(x):
    """Sine."""


@_builtin
def cos(x):
    """Cosine."""


@_builtin
def tanh(x):
    """Hyperbolic tangent."""


@_builtin
def sigmoid(x):
    """1 / (1 + exp(-x))."""


@_builtin
def erf(x):
    """The error function."""


@_builtin
def floor(x):
    """Round down; the dtype stays."""


@_builtin
def ceil(x):
    """Round up; the dtype stays."""


@_builtin
def abs(x):
    """Absolute value."""


def _host_cdiv(x: int, y: int) -> int:
    return -(-x // y)


def _cdiv(x, y):
    """``x / y`` rounded up, for integers and positive ``y``. Works on the host too."""


_cdiv.__name__ = _cdiv.__qualname__ = "cdiv"
cdiv = Builtin(_cdiv, host=_host_cdiv)


# --- reductions and matrix products ----------------------------------------------------------------


@_builtin
def sum(x, axis=None, keepdims=False):
    """Sum over an axis, several (a tuple) or all (None: a scalar).

    float16 and bfloat16 accumulate in float32 and round once; bool, int8 and int16 give int32.
    """


@_builtin
def prod(x, axis=None, keepdims=False):
    """Product over axes; dtypes as for `sum`."""


@_builtin
def max(x, axis=None, keepdims=False):
    """Largest element over axes (None: all). Two values: `maximum`."""


@_builtin
def min(x, axis=None, keepdims=False):
    """Smallest element over axes (None: all). Two values: `minimum`."""


@_builtin
def argmax(x, axis=None, keepdims=False):
    """The position (int32) of the largest element along an axis; of the first of several, of the first NaN.

    ``axis`` None: the position in row-major order, a scalar.
    """


@_builtin
def argmin(x, axis=None, keepdims=False):
    """The position (int32) of the smallest element along an axis, as `argmax`."""


@_builtin
def cumsum(x, axis=0):
    """Running sums along an axis, each element included; dtypes as for `sum`. Same input, same bits."""


@_builtin
def cat(tiles, axis=0):
    """Tiles one behind the other along an axis: a tuple or list, of one dtype and equal in all other sizes."""


@_builtin
def dot(a, b, acc=None, precision="default"):
    """``acc + a @ b`` for tiles (M, K) and (K, N) of one dtype.

    ``acc`` defaults to zeros: float32, float64 for float64, int32 for integers.
    ``precision``, of float32 operands: "default" and "ieee" are true float32, "tf32" keeps 11 bits of each operand, and
    "3xtf32" nearly float32 in three such products (finite values only: an infinity becomes NaN).
    """


# --- control ------------------------------------------------------------------------------------


@_builtin
def range(start, stop=None, step=1):
    """A run-time loop, as Python's range; the step is positive."""


@_builtin
def static_range(start, stop=None, step=1):
    """A loop that is unrolled: the bounds and the index are compile-time values."""


@_builtin
def static_assert(condition, message=""):
    """Fail the compilation unless a compile-time condition holds."""


# --- checks -------------------------------------------------------------------------------------


@_builtin
def device_print(text, *values):
    """Print ``text`` with each ``{}`` replaced by a value: ``tw.device_print("x = {}, n = {}", x, n)``.

    Scalars alone give one line for each program. With tiles (broadcast together) there is one line for each
    element, which begins with its position. Braces are written twice. Not on AMD GPUs.
    """


@_builtin
def device_assert(condition, message=""):
    """Stop the kernel with an error unless a condition holds: a scalar, or every element of a bool tile."""


@_builtin
def assume(condition):
    """Promise that a scalar condition holds; the compiler relies on it without a check (the interpreter checks).

    ``tw.assume(x.shape[1] % 128 == 0)`` drops the code for tiles that stick out.
    """


# --- many GPUs -------------------------------------------------------------------------------------


@_builtin
def rank():
    """The number of this GPU among those that launch the kernel together (int32)."""


@_builtin
def world_size():
    """How many GPUs launch the kernel together (int32)."""


@_builtin
def turn():
    """0 and 1 in turn, launch after launch of a world (int32), the same on all ranks.

    Of a `Symmetric` tensor (2, ...) of which a kernel uses ``t[turn()]`` alone, flags included, ranks write to each
    other's half without waiting until all have begun the launch: in the launch before, the other half had its turn.
    Such tensors belong to kernels that use them in turn, and nobody else reads or writes them.
    """


@_builtin
def send(packets, value):
    """Start writing a tile to another rank in packets, which tell of their own arrival: for small messages.

    ``packets``: a view (n,) of a `Symmetric` int64 tensor that was zero at first, mostly another rank's, for this tile
    alone: one int64 for four bytes. Nothing but `send` and `receive` uses the tensor, in tiles of one size. Twice the
    bytes of `put`, but no flag, and no wait for the tile to arrive before the flag is set.
    """


@_builtin
def receive(packets, shape, dtype):
    """The tile (``shape``, ``dtype``) that a rank sends in this launch to the own rank's ``packets``; waits for it."""


@_builtin
def put(view, index, value, after=None):
    """Start writing a tile to a `Symmetric` tensor, as `store` does, mostly another rank's: ``t.peer(r)``.

    Gives a token. Who reads the tile waits for a flag that is signalled after it: ``signal(flag, r, after=token)``.
    ``after``: tokens of `wait`, where the place must have been given back before it is written again.
    """


@_builtin
def reduce_put(view, index, value, after=None):
    """As `put`, but add the tile to what is in memory. The order of additions, and so the rounding, is open."""


@_builtin
def get(view, index, shape=None, pad=0, after=None):
    """Read a tile of another rank's tensor; the same as `load`."""


@_builtin
def signal(flag, peer, after=None):
    """Set a flag on rank ``peer``; whoever waits for it there sees the puts that ``after`` names (a token or several).

    A flag is an element of an int32 `Symmetric` tensor, ``flags[i, j]``, unset when a launch begins. It is signalled at
    most once in a launch. It comes after everything that the program has read so far.
    """


@_builtin
def wait(flags, when=True, earlier=None):
    """Wait until a flag of the own rank is set, or all flags of a view; gives the token that `load` takes as ``after``.

    Where ``when``, a scalar, is false the token is there at once: of a symmetric tensor the part that the own rank has
    written before the launch needs no waiting.

    ``earlier``, a positive integer: wait for flags that the launch so many launches of the world before this one has
    set, and that have been copied to this rank behind data (`World.start_push`, ``tell``).

    A program may wait for signals of programs before it along grid axis 2 and for those that it sends itself.
    """


@_builtin
def barrier(flags, after=None):
    """Wait until the programs with these flags have come here on all ranks; gives a token like `wait`.

    ``flags``: a view of ``world_size()`` flags that nothing else uses. Each rank sets its own on all others.
    """


# --- collectives on tiles ----------------------------------------------------------------------------


@_builtin
def all_reduce(value, buffer, flags):
    """The sum of a tile of each rank, on all ranks, in the order of ranks (float16 and bfloat16 in float32).

    ``buffer``: a `Symmetric` view (world, *tile) of the tile's dtype, ``flags``: a view of ``world_size()`` flags. Both
    belong to this call alone in a launch; the programs with the same ones on all ranks take part. All collectives
    have them.
    """


@_builtin
def all_gather(value, buffer, flags):
    """Send a tile to all ranks; gives a token, after which ``buffer[r]`` is the tile of rank r."""


@_builtin
def reduce_scatter(view, index, shape, buffer, flags):
    """The sum over ranks of the tiles for this rank: each sends the tile at ``index`` of ``view[r]`` to rank r."""


@_builtin
def all_to_all(view, index, shape, buffer, flags):
    """Send the tile at ``index`` of ``view[r]`` to rank r; gives a token: then ``buffer[r]`` is what r has sent."""


@_builtin
def ring_shift(value, buffer, flags):
    """Send a tile to the next rank, and give that of the rank before."""


bool = i1  # last: from here on the name is the dtype

#: every builtin by name; the public package re-exports all of `EXPORTS`
BUILTINS: dict[str, Builtin] = {name: value for name, value in list(globals().items()) if isinstance(value, Builtin)}
DTYPE_EXPORTS = (
    "bool", "bool_", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64",
    "float8_e4m3", "float8_e5m2",
)  # fmt: skip
EXPORTS: tuple[str, ...] = (*BUILTINS, *DTYPE_EXPORTS, "Tensor", "Symmetric", "constexpr", "function", "spec")

__all__ = ["BUILTINS", "EXPORTS", "FunctionDefinition", "Symmetric", "Tensor", "constexpr", "function", "spec"]
