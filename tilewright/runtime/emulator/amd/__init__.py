"""An emulator of AMD CDNA3 (gfx942) and CDNA4 (gfx950) that executes assembly text in NumPy.

``AmdEmulator(asm_text, kernel_name, arch)`` decodes one kernel (an instruction it does not know is an
error there, not in the middle of a run); ``launch(memory, grid, block, kernarg)`` runs it against a
``GlobalMemory``. References cited throughout as "ISA": *AMD Instinct MI300 Instruction Set
Architecture* (CDNA3) and *AMD Instinct CDNA4 Instruction Set Architecture*, by chapter.
"""

from tilewright.runtime.emulator.amd.errors import DecodeError, EmulatorError, EmulatorFault
from tilewright.runtime.emulator.amd.machine import AmdEmulator, LaunchStatistics
from tilewright.runtime.emulator.memory import GlobalMemory

__all__ = ["AmdEmulator", "DecodeError", "EmulatorError", "EmulatorFault", "GlobalMemory", "LaunchStatistics"]
