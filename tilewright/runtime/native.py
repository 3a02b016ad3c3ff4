"""The optional extension `_native`: repeated launches and calls of operators without Python.

It is one C file without dependencies, compiled when the package is installed where there is a C compiler and the
headers of Python, and never needed: `host` gives None without it. See docs/torch.md.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

#: of what the extension offers
_VERSION = 8

extension: Any = None
try:
    from tilewright.runtime import _native  # type: ignore[attr-defined]
except ImportError:  # built without a compiler, or for another Python
    pass
else:
    if _native.VERSION == _VERSION:  # else the checkout is newer than what was built in it
        extension = _native

#: DLPack's number of CUDA
_CUDA = 2
#: what torch calls the dispatcher's state of a thread: the words of what is included and what is excluded, each but for
#: what they hold at first
_LIBRARY, _STATE = "libc10.so", "_ZN3c104impl26raw_local_dispatch_key_setE"


def host(device: Any) -> Any:
    """What `extension.Table` and `extension.Program` of a CUDA device go through; None where they cannot be used."""
    torch = sys.modules.get("torch")
    if extension is None or torch is None or not hasattr(device, "entry_point"):
        return None
    return _host(device, torch)


@cache
def _host(device: Any, torch: ModuleType) -> Any:
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    allocate = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)
    if exchange is None or allocate is None:  # a torch before 2.11
        return None
    names = "cuLaunchKernel", "cuLaunchKernelEx", "cuTensorMapEncodeTiled", "cuCtxGetCurrent"
    try:
        addresses = [device.entry_point(name) for name in names]
    except (OSError, AttributeError):  # a stand-in for the driver, of tests
        return None
    return make_host(torch, exchange, allocate, _CUDA, *addresses)


def make_host(
    torch: Any, exchange: Any, allocate: Any, device_type: int, launch: int, early: int, encode: int, context: int
) -> Any:
    """A Host for torch tensors of a kind of device, with the addresses of the driver's functions."""
    functions = torch._C._functorch, torch.is_autocast_enabled

    def watched() -> bool:
        """Whether modes, transforms or autocast are at work in this thread."""
        transforms, autocast = functions
        modes = torch._C._len_torch_dispatch_stack() or transforms.peek_interpreter_stack() is not None
        return bool(modes or autocast("cuda") or autocast("cpu"))

    profiled = torch.autograd._profiler_enabled
    default_device = import_module("torch.utils._device").DeviceContext

    def looks() -> bool:
        """Whether something sees calls of functions: a profiler, or a mode but for torch's default device."""
        count = torch._C._len_torch_function_stack()
        modes = (torch._C._get_function_stack_at(i) for i in range(count))
        return profiled() or any(type(mode) is not default_device for mode in modes)

    given = {
        "exchange": exchange,
        "types": (torch.Tensor, torch.nn.Parameter),
        "allocate": allocate,
        "gradients": torch.is_grad_enabled,
        "plain": watched,
        "quiet": (torch._C._len_torch_function_stack, profiled),
        "harmless": looks,
        "negated": torch.Tensor.is_neg,
        "forward": vars(torch.autograd.forward_ad),
        "device_type": device_type,
        "launch": launch,
        "launch_early": early,
        "encode": encode,
        "context": context,
        "state": _STATE,
    }
    with torch.inference_mode(False):
        made = extension.Host(library=_LIBRARY, allowed=_harmless(torch), **given)
        if not _sees_state(torch, made):
            made = extension.Host(library=None, allowed=(0, 0), **given)
    return made


def _words(torch: Any) -> tuple[int, int]:
    keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    included, excluded = (int(each.raw_repr()) for each in keys)
    return included, excluded


def _harmless(torch: Any) -> tuple[int, int]:
    """Bits of the dispatcher's state that change where gradients are not recorded, and in autograd's threads."""
    plain = _words(torch)
    found = [0, 0]
    for context in (torch._C._AutoDispatchBelowAutograd(), torch.inference_mode()):
        with context:
            for i, (word, at_first) in enumerate(zip(_words(torch), plain, strict=True)):
                found[i] |= word ^ at_first
    return found[0], found[1] | _names_of_dimensions(torch, found[1])


def _names_of_dimensions(torch: Any, autograd: int) -> int:
    """The bit of names of dimensions, which autograd's threads leave out; 0 where torch has none (from 2.13 on).

    It lies below those of ``autograd``. The enumeration of keys leaves it out, their text does not.
    """
    keys = torch._C.DispatchKeySet
    below = range((autograd & -autograd).bit_length() - 1 if hasattr(keys, "from_raw_repr") else 0)
    return next((1 << i for i in below if str(keys.from_raw_repr(1 << i)) == "DispatchKeySet(Named)"), 0)


def _sees_state(torch: Any, made: Any) -> bool:
    """Whether the extension reads what torch tells of the state, in several states."""
    plain, raw = _words(torch), made.state()
    if raw is None:
        return False
    contexts = torch._C._AutoDispatchBelowAutograd(), torch.inference_mode(), torch.autocast("cpu")
    for context in contexts:
        with context:
            expected = [r ^ a ^ b for r, a, b in zip(raw, plain, _words(torch), strict=True)]
            if list(made.state() or ()) != expected or expected == list(raw):
                return False
    return True


__all__ = ["extension", "host", "make_host"]
