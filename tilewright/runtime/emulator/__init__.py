"""Emulated devices: they execute the text a backend emitted, instruction by instruction, in NumPy."""
