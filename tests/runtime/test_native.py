"""Launches that repeat without Python, on a device whose kernels the interpreter runs."""

from __future__ import annotations

import gc
import threading

import pytest

from tilewright.runtime import native

torch = pytest.importorskip("torch")
if native.extension is None or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    pytest.skip("needs the extension, and a torch that it can read", allow_module_level=True)

from host_launches import HostLaunches  # noqa: E402

import tilewright as tw  # noqa: E402
from tilewright.compiler.kernel import Kernel  # noqa: E402
from tilewright.runtime.errors import ArgumentError  # noqa: E402


def scaled(
    x: tw.Tensor, y: tw.Tensor, factor: tw.float32, n: tw.int64, step: tw.float64 = 0.0, *, B: tw.constexpr = 16
):
    i = tw.program_id(0)
    tw.store(y, i, tw.load(x, i, B) * factor + n.to(tw.float32) + step.to(tw.float32))


def turned(x: tw.Tensor, y: tw.Tensor, *, FN: tw.constexpr, B: tw.constexpr = 8):
    i, j = tw.program_id(0), tw.program_id(1)
    tw.store(y, (i, j), FN(tw.load(x, (i, j), (B, B))))


@tw.function
def negated(x):
    return -x


@tw.function
def doubled(x):
    return x * 2


@pytest.fixture
def launches(monkeypatch):
    made = HostLaunches()
    made.install(monkeypatch)
    yield made
    made.remove()
    assert not made.errors


@pytest.fixture
def kernel(launches):
    return Kernel(scaled)


def repeated(launches, call):
    """Whether a call started its kernels without Python."""
    python, started = len(launches.python), len(launches.started)
    call()
    assert (len(launches.python) > python) != (len(launches.started) > started)
    return len(launches.started) > started


def warm(kernel, *args, **kwargs):
    for _ in range(3):
        kernel[(3,)](*args, **kwargs)
    assert kernel.table is not None


def test_the_third_call_repeats(launches, kernel):
    x = torch.randn(48)
    seen = []
    for _ in range(4):
        y = torch.full((48,), float("nan"))
        seen.append(repeated(launches, lambda y=y: kernel[(3,)](x, y, 2.0, 1)))
        assert torch.equal(y, x * 2 + 1)
    # the first has no table yet, the second is seen, the third recorded
    assert seen == [False, False, False, True]


def test_kernels_that_wait_for_the_one_before_start_early(launches):
    x, y = torch.randn(48), torch.empty(48)
    first, second = Kernel(scaled), Kernel(scaled)  # the stand-in makes the first of two wait for what is before it
    for kernel in (first, second):
        warm(kernel, x, y, 2.0, 1)
        kernel[(3,)](x, y, 2.0, 1)
    assert len(launches.started) == 2 and launches.early == launches.started[:1]
    stream = 0x1_2345_6789
    first[(3,)](x, y, 3.0, 1, stream=stream)
    assert launches.early[-1] == ("scaled", stream) and torch.equal(y, x * 3 + 1)


def test_addresses_and_numbers_change(launches, kernel):
    warm(kernel, torch.randn(48), torch.empty(48), 1.0, 1)
    for i, step in enumerate((0.0, 0.25, -3.0)):
        x, y = torch.randn(48), torch.full((48,), float("nan"))
        given = (x, y, 0.5 * i, 2**31 - 1 - i, step) if step else (x, y, 0.5 * i, 2**31 - 1 - i)
        kernel[(3,)](*given)
        torch.testing.assert_close(y, x * 0.5 * i + float(2**31 - 1 - i) + step)
    assert len(launches.started) >= 1


def test_numbers_of_other_kinds(launches, kernel):
    x, y = torch.randn(48), torch.empty(48)
    cases = [(1.5, 7), (2, 7), (2**40, 7), (1.5, 2**40), (1.5, -(2**40)), (-0.0, 0), (float("inf"), 1)]
    for _ in range(4):
        for factor, n in cases:
            kernel[(3,)](x, y.fill_(float("nan")), factor, n)
            expected = x * torch.tensor(float(factor)) + torch.tensor(float(n))
            assert torch.equal(y, expected), (factor, n)
    assert repeated(launches, lambda: kernel[(3,)](x, y, 5, 8))  # an int where a float is wanted is converted
    assert torch.equal(y, x * 5 + 8)
    started = len(launches.started)
    with pytest.raises(ArgumentError, match="does not fit f32"):
        kernel[(3,)](x, y, 1e300, 7)
    assert len(launches.started) == started


def test_grids_and_keywords_are_told_apart(launches, kernel):
    x = torch.randn(48)
    for _ in range(4):
        for grid, block, kept in (((3,), 16, 48), ((2,), 16, 32), ((3,), 8, 24), (2, 16, 32)):
            y = torch.zeros(48)
            kernel[grid](x, y, 2.0, 0, B=block)
            assert torch.equal(y[:kept], x[:kept] * 2) and not y[kept:].any()
    y = torch.zeros(48)
    assert repeated(launches, lambda: kernel[(2,)](x, y, 2.0, 0, B=16))
    kept = len(kernel.table)
    for _ in range(4):
        assert not repeated(launches, lambda: kernel[lambda meta: (2,)](x, y, 2.0, 0, B=16))
    assert len(kernel.table) == kept


def test_compile_time_functions_are_told_apart(launches):
    kernel = Kernel(turned)
    x = torch.randn(16, 16)
    for _ in range(4):
        for function, expected in ((negated, -x), (doubled, x * 2)):
            y = torch.empty(16, 16)
            kernel[(2, 2)](x, y, FN=function)
            assert torch.equal(y, expected)
    assert len(launches.started) >= 2


def test_shapes_strides_dtypes_and_alignment_are_told_apart(launches):
    kernel = Kernel(turned)
    memory = torch.randn(40 * 40)
    views = [
        memory[: 16 * 16].view(16, 16),
        memory[: 16 * 16].view(16, 16).T,
        memory[: 16 * 32].view(16, 32)[:, :16],
        memory[1 : 16 * 16 + 1].view(16, 16),
        memory[: 16 * 16].view(16, 16).to(torch.float16),
        memory[:16].view(1, 16).expand(16, 16),
        memory[: 16 * 16].view(16, 16)[:12, :9],
    ]
    for _ in range(4):
        for x in views:
            y = torch.full(x.shape, float("nan"), dtype=x.dtype)
            kernel[(2, 2)](x, y, FN=negated)
            assert torch.equal(y, -x)
    assert len(kernel.table) == len(views)


def test_tensor_maps_follow_addresses(launches):
    kernel = Kernel(turned)
    x, ys = torch.randn(16, 16), [torch.empty(16, 16) for _ in range(2)]
    for i in range(60):
        kernel[(2, 2)](x, ys[i % 2].fill_(0), FN=negated)
        assert torch.equal(ys[i % 2], -x)
    before = launches.encoded
    assert before < 30
    for y in ys * 4:
        kernel[(2, 2)](x, y, FN=negated)
    assert launches.encoded == before  # nothing has moved
    moved = torch.full((16, 16), float("nan"))
    kernel[(2, 2)](x, moved, FN=negated)
    assert launches.encoded == before + 1 and torch.equal(moved, -x)


def test_tensor_maps_of_many_layers(launches):
    """A program serves tensors in many places, and keeps about as many maps."""
    kernel = Kernel(turned)
    pairs = [(torch.randn(16, 16), torch.empty(16, 16)) for _ in range(24)]

    def rounds(count):
        before = launches.encoded
        for _ in range(count):
            for x, y in pairs:
                kernel[(2, 2)](x, y.fill_(0), FN=negated)
                assert torch.equal(y, -x)
        return (launches.encoded - before) / (2 * count * len(pairs))

    rounds(12)
    assert rounds(4) < 0.7  # of 48 maps that each round needs


def test_streams(launches, kernel):
    x, y = torch.randn(48), torch.empty(48)
    warm(kernel, x, y, 1.0, 1)

    class Stream:
        cuda_stream = 99

    for stream, handle in ((None, 0), (77, 77), (Stream(), 99)):
        assert repeated(launches, lambda stream=stream: kernel[(3,)](x, y, 1.0, 1, stream=stream))
        assert launches.started[-1] == ("scaled", handle)
    for _ in range(3):  # a keyword before and behind the stream
        kernel[(3,)](x, y, factor=3.0, stream=5, n=2)
    assert launches.started[-1] == ("scaled", 5) and torch.equal(y, x * 3 + 2)
    with pytest.raises(ArgumentError, match="A stream must be"):
        kernel[(3,)](x, y, 1.0, 1, stream="blue")


def test_another_context_goes_through_python(launches, kernel):
    x, y = torch.randn(48), torch.empty(48)
    warm(kernel, x, y, 1.0, 1)
    launches.context = 0xBAD
    assert not repeated(launches, lambda: kernel[(3,)](x, y, 1.0, 1))
    launches.context = launches.device.context
    assert repeated(launches, lambda: kernel[(3,)](x, y, 1.0, 1))


def test_a_failing_start_is_pythons_to_report(launches, kernel):
    x, y = torch.randn(48), torch.empty(48)
    warm(kernel, x, y, 1.0, 1)
    launches.failing = True
    assert not repeated(launches, lambda: kernel[(3,)](x, y.zero_(), 1.0, 1))
    assert torch.equal(y, x + 1)


def test_what_it_does_not_take_goes_through_python(launches, kernel):
    x, y = torch.randn(48), torch.empty(48)
    warm(kernel, x, y, 1.0, 1)
    assert repeated(launches, lambda: kernel[(3,)](torch.nn.Parameter(x), y, 1.0, 1))

    class Mine(torch.Tensor):
        pass

    kernel[(3,)](x.as_subclass(Mine), y.zero_(), 1.0, 1)
    assert torch.equal(y, x + 1)
    kernel[(3,)](x.numpy(), y.zero_(), 1.0, 1)
    assert torch.equal(y, x + 1)
    with pytest.raises(tw.ArgumentError):
        kernel[(3,)](x.to("meta"), y, 1.0, 1)
    with pytest.raises(tw.ArgumentError):
        kernel[(3,)](x, y, 1.0, object())
    with pytest.raises(tw.ArgumentError):
        kernel[(3,)](x, y)


def test_an_empty_tensor(launches, kernel):
    for _ in range(4):
        kernel[(0,)](torch.empty(0), torch.empty(0), 1.0, 1)
        kernel[(1,)](torch.empty(0), torch.empty(0), 1.0, 1)


def test_a_table_is_bounded(launches, kernel, monkeypatch):
    monkeypatch.setattr("tilewright.compiler.recording.MOST_PROGRAMS", 8)
    for n in range(1, 24):
        x, y = torch.randn(n), torch.full((n,), float("nan"))
        for _ in range(3):
            kernel[(tw.cdiv(n, 16),)](x, y, 2.0, 0)
        assert torch.equal(y, x * 2)
    assert len(kernel.table) <= 8


def test_threads_share_a_table(launches, kernel):
    wrong = []

    def work(seed):
        x = torch.randn(48, generator=torch.Generator().manual_seed(seed))
        for n in range(20):
            y = torch.full((48,), float("nan"))
            kernel[(3,)](x, y, float(seed), n % 7)
            if not torch.equal(y, x * seed + n % 7):
                wrong.append((seed, n))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and launches.started


def test_a_table_keeps_what_it_compares_by_identity(launches):
    kernel = Kernel(turned)
    x, y = torch.randn(16, 16), torch.empty(16, 16)

    def make(k):
        @tw.function
        def plus(x):
            return x + k

        return plus

    for k in range(6):
        kernel[(2, 2)](x, y, FN=make(k))
        gc.collect(1)  # what is young: all takes seconds behind other tests
        assert torch.equal(y, x + k)


def test_what_a_list_may_drop_goes_through_python(launches):
    class Thing:
        pass

    def record(x, things):
        things.clear()
        return None, None

    calls = []
    table = native.extension.Table(
        host=launches.host,
        slow=lambda x, things: calls.append(len(things)),
        record=record,
        recorded=None,
        launches=False,
        numbers=0,
        most=8,
    )
    x = torch.zeros(4)
    for _ in range(3):
        table(x, [Thing()])
    gc.collect(1)  # visits all that the table, which is young, keeps
    assert calls == [1, 1, 1] and len(table) == 0
    for _ in range(3):
        table(x, [1, 2.0, None])
    assert len(table) == 1


def test_a_table_needs_a_whole_host():
    extension = native.extension
    host = extension.Host.__new__(extension.Host)
    with pytest.raises(ValueError, match="initialized"):
        extension.Table(host=host, slow=print, record=print, recorded=None, launches=False, numbers=0, most=8)


def test_programs_are_checked():
    program = native.extension.Program
    start = (1, (1, 1, 1), 128, 0, True, bytes(16), (0, 8), ((0, 0, 0, 0),), ())

    def make(start):
        return program(context=1, ordinal=0, starts=(start,), allocations=(), results=(), single=False, keep=None)

    make(start)
    beyond = ((9, 0, 0, 0),), ((13, 1, 0, 0),), ((2**32 - 4, 0, 0, 0),), ((0, 0, 99, 0),)
    maps = (0, 0, 0, 1, (8,), (), (8,), 0), (2**32 - 64, 0, 0, 1, (8,), (), (8,), 0)
    wrong = [(7, patches) for patches in beyond] + [(8, (each,)) for each in maps]
    for index, value in [*wrong, (6, (0, 16)), (5, bytes(9000))]:
        with pytest.raises(ValueError):
            make((*start[:index], value, *start[index + 1 :]))
    for index in (-1, 1):
        with pytest.raises(ValueError, match="the index of an allocation"):
            program(
                context=1,
                ordinal=0,
                starts=(),
                allocations=(((1,), (1,), None),),
                results=(index,),
                single=True,
                keep=None,
            )


def test_a_stale_build_is_not_used():
    assert native.extension.VERSION == native._VERSION
