"""Loads the Python file that the command line names; its errors are shown as the user's, not as ours."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from types import ModuleType

from tilewright.frontend.errors import CompileError

#: what the file is called as a module: no ``__main__``, so that its script part does not run
MODULE_NAME = "tilewright_user_program"


class UserProgramError(Exception):
    """The file cannot be parsed, or raises while it is imported. The text is what Python would print for it."""


def load_program(path: Path) -> ModuleType:
    """The module that a file defines. UserProgramError, or the CompileError that it raises."""
    module = ModuleType(MODULE_NAME)
    module.__file__ = str(path)
    sys.modules[MODULE_NAME] = module  # dataclasses and pickle look their module up
    sys.path.insert(0, str(path.resolve().parent))
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    except CompileError:
        raise
    except SyntaxError as error:
        where = "" if error.filename else f"{path}: "
        raise UserProgramError(where + "".join(traceback.format_exception_only(error)).rstrip()) from None
    except SystemExit as error:
        raise UserProgramError(f"{path} ended with exit code {error.code} while it was imported") from None
    except Exception as error:
        raise UserProgramError(_trace(error)) from None
    return module


def _trace(error: Exception) -> str:
    """The traceback without our own frame."""
    assert error.__traceback__ is not None
    return "".join(traceback.format_exception(error.with_traceback(error.__traceback__.tb_next))).rstrip()
