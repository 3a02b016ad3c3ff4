"""Kernels of several GPUs: communication is part of the tile program.

Each file has the kernels, a function that launches them on a `tw.World`, and a float64 reference for any number of
ranks. Arrays that only the own rank sees are passed as `World.launch` takes them: a list with one for each rank where
one process drives all GPUs, else the own rank's.
"""
