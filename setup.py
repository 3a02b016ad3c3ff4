"""The optional extension; everything else is in pyproject.toml."""

from setuptools import Extension, setup

SOURCES = "tilewright/runtime/extension"

# repeated launches without Python (tilewright/runtime/native.py); all works without it, where no C compiler is
setup(
    ext_modules=[
        Extension(
            "tilewright.runtime._native",
            [f"{SOURCES}/table.c"],
            depends=[f"{SOURCES}/{name}.h" for name in ("host", "program", "key")],
            optional=True,
        )
    ]
)
