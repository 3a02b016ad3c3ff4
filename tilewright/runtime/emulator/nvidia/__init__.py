"""An emulator of NVIDIA GPUs (sm_80 to sm_90a) that executes PTX text in NumPy.

``PtxEmulator(ptx, entry)`` decodes one kernel (an instruction it does not know is an error there,
not in the middle of a run); ``launch(memory, grid, block, parameters)`` runs it against a
``GlobalMemory``. "PTX ISA" is NVIDIA's *Parallel Thread Execution ISA*, version 8.x, by section.
"""

from tilewright.runtime.emulator.errors import DecodeError, EmulatorError, EmulatorFault
from tilewright.runtime.emulator.memory import GlobalMemory
from tilewright.runtime.emulator.nvidia.machine import LaunchStatistics, PtxEmulator
from tilewright.runtime.emulator.nvidia.tensor_map import encode_tensor_map

__all__ = [
    "DecodeError",
    "EmulatorError",
    "EmulatorFault",
    "GlobalMemory",
    "LaunchStatistics",
    "PtxEmulator",
    "encode_tensor_map",
]
