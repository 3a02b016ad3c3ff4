"""What compiling a kernel gives: binary, text of every level, launch contract and resources."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tilewright.compiler.environment import LAUNCH_OVERLAP
from tilewright.ir.abi import KernelABI
from tilewright.ir.resources import Resources
from tilewright.runtime.device import Device

#: hexadecimal digits that tell variants apart in the names of folders
_VARIANT_DIGITS = 8


def variant_of(inputs: Sequence[str], options: str) -> str:
    """A short key of what the passes were given: the text of each entry, and the options."""
    return hashlib.sha256("\0".join([options, *inputs]).encode()).hexdigest()[:_VARIANT_DIGITS]


def dump_folder(entry: str, target: str, variant: str) -> str:
    """The folder of an entry's dumps below ``TILEWRIGHT_DUMP_DIR``."""
    return "-".join(part for part in (entry, target, variant) if part)


@dataclass(frozen=True)
class Entry:
    """One entry point of a binary. ``resources``: registers, spills, shared memory, as the tools report them."""

    abi: KernelABI
    resources: Resources


@dataclass
class Artifact:
    """A compiled kernel.

    ``asm`` holds the texts by kind (``llvm``, ``ptx`` or ``amdgcn``); ``passes`` the Tile IR by entry
    and pass (``input`` is the frontend's). ``entries`` are tried in order at launch: the first whose
    assumptions on alignment hold is started, and the last one assumes nothing. ``variant`` tells apart what
    one kernel gives with other types, constants and options (`variant_of`). ``seconds`` is what it took to get the
    artifact, ``cached`` whether it came from the disk cache.
    """

    name: str
    target: str
    binary: bytes
    entries: tuple[Entry, ...]
    asm: Mapping[str, str] = field(default_factory=dict)
    passes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    variant: str = ""
    seconds: float = 0.0
    cached: bool = False
    _loaded: dict[str, list[tuple[KernelABI, Any]]] = field(default_factory=dict, repr=False)

    @property
    def abi(self) -> KernelABI:
        """The launch contract of the first entry."""
        return self.entries[0].abi

    @property
    def resources(self) -> Resources:
        """Resources of the first entry."""
        return self.entries[0].resources

    @property
    def ir(self) -> Mapping[str, str]:
        """The Tile IR of the first entry after each pass, by the pass's name."""
        return self.passes.get(self.abi.name, {})

    def files(self) -> dict[str, str]:
        """What ``TILEWRIGHT_DUMP_DIR`` receives: relative path -> text, a numbered file for each pass."""
        found = {}
        for entry, texts in self.passes.items():
            for number, (name, text) in enumerate(texts.items()):
                found[f"{dump_folder(entry, self.target, self.variant)}/{number:02d}-{name.partition('.')[0]}.tw"] = (
                    text
                )
        suffixes = {"llvm": "ll", "amdgcn": "s"}
        for kind, text in self.asm.items():
            folder = dump_folder(self.name, self.target, self.variant)
            found[f"{folder}/{self.name}.{suffixes.get(kind, kind)}"] = text
        return found

    def dump(self, directory: str | Path) -> None:
        """Write `files` below ``directory``."""
        for relative, text in self.files().items():
            path = Path(directory) / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

    def save(self, path: str | Path) -> Path:
        """Write the binary (cubin or HSACO) and return its path."""
        path = Path(path)
        path.write_bytes(self.binary)
        return path

    def launch(self, device: Device, grid: Sequence[int] | int, args: Sequence[Any], stream: Any = None) -> None:
        """Start the kernel on ``device`` with one argument for each run-time parameter, in order."""
        abi, function = self._entry(device, args)
        device.launch(function, abi, grid, args, stream)

    def ready(self, device: Device, grid: Sequence[int] | int, args: Sequence[Any]) -> Callable[[Any], None]:
        """This launch as a function of the stream, loaded and packed: see `Device.ready`."""
        abi, function = self._entry(device, args)
        return device.ready(function, abi, grid, args)

    def prepare(self, device: Device, grid: Sequence[int] | int, args: Sequence[Any]) -> Callable[[Any], None] | None:
        """This launch as a function of the stream alone; None where the device has no such form."""
        abi, function = self._entry(device, args)
        return device.prepare(function, abi, grid, args)

    def form(self, device: Device, grid: Sequence[int] | int, args: Sequence[Any]) -> Any:
        """This launch as a `LaunchForm`; None where the device has no such form."""
        abi, function = self._entry(device, args)
        return device.form(function, abi, grid, args)

    def _entry(self, device: Device, args: Sequence[Any]) -> tuple[KernelABI, Any]:
        """The first entry whose assumptions hold, loaded on the device."""
        loaded = self._loaded.get(device.name)
        if loaded is None:
            loaded = self._load(device)
        if len(loaded) == 1:
            return loaded[0]
        return next((e for e in loaded if assumptions_hold(e[0], args, device)), loaded[-1])

    def _load(self, device: Device) -> list[tuple[KernelABI, Any]]:
        module = device.load(self.binary, self.asm)
        overlap = LAUNCH_OVERLAP.get()
        loaded = [
            (e.abi if overlap else replace(e.abi, awaits_grid=False), module.function(e.abi.name)) for e in self.entries
        ]
        self._loaded[device.name] = loaded
        return loaded


def assumptions_hold(abi: KernelABI, args: Sequence[Any], device: Device) -> bool:
    """Whether the arguments are aligned as this entry assumes."""
    from tilewright.ir.abi import TensorParam
    from tilewright.runtime.arguments import check_tensor
    from tilewright.runtime.errors import ArgumentError

    for param, argument in zip(abi.params, args, strict=True):
        if isinstance(param, TensorParam):
            try:
                check_tensor(param, device.view(argument, param.name))
            except ArgumentError:
                return False
    return True
