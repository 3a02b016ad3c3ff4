"""The optional extension; everything else is in pyproject.toml."""

from setuptools import Extension, setup

# repeated launches without Python (tilewright/runtime/native.py); all works without it, where no C compiler is
setup(ext_modules=[Extension("tilewright.runtime._native", ["tilewright/runtime/_native.c"], optional=True)])
