"""Import users' own rewards and methods by name: MODULE:NAME, or FILE.py:NAME."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from trajsurgery.errors import RecipeError, suggest


def import_named(reference: str) -> Any:
    """Return the object that "MODULE:NAME" or "FILE.py:NAME" names. A module is looked for in the working folder first.

    Raises:
        RecipeError: there is no such file, module or name; the import raised an error, which the message repeats.
    """
    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise RecipeError(f"{reference!r} is not MODULE:NAME or FILE.py:NAME, such as my_reward.py:Brightness.")
    module = _import_file(reference, Path(place)) if place.endswith(".py") else _import_module(reference, place)
    if not hasattr(module, name):
        names = [each for each in vars(module) if not each.startswith("_")]
        raise RecipeError(f"{reference!r}: {place} has no {name!r}.{suggest(name, names)} It has {', '.join(names)}.")
    return getattr(module, name)


def error_text(error: BaseException) -> str:
    """Return an error's kind and text, and the line of the user's code that raised it."""
    others = (__file__, "<frozen", "site-packages")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not any(other in f.filename for other in others)]
    line = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{line}"


def _import_module(reference: str, name: str) -> ModuleType:
    folder = Path.cwd()
    try:
        with _first_on_path(folder):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise RecipeError(f"{reference!r}: importing {name} raised {error_text(error)}.") from error
        files = [path.stem for path in folder.glob("*.py")]
        raise RecipeError(
            f"{reference!r}: there is no module {error.name!r} in the working folder {folder} or among the installed "
            f"packages.{suggest(name, files)} FILE.py:NAME takes a file wherever it is."
        ) from error
    except (Exception, SystemExit) as error:
        raise RecipeError(f"{reference!r}: importing {name} raised {error_text(error)}.") from error


def _import_file(reference: str, path: Path) -> ModuleType:
    """Import a file once, under its path as its name, so that it can't be taken for another module."""
    path = path.expanduser().resolve()
    if not path.is_file():
        files = [file.name for file in path.parent.glob("*.py")]
        raise RecipeError(f"{reference!r}: there is no file {path}.{suggest(path.name, files)}")
    name = str(path)
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    try:
        with _first_on_path(path.parent):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise RecipeError(f"{reference!r}: importing it raised {error_text(error)}.") from error
    return module


@contextmanager
def _first_on_path(folder: Path) -> Generator[None]:
    """Look for modules in this folder first, as Python does for a script; afterwards last, so that it hides nothing."""
    place = str(folder)
    importlib.invalidate_caches()
    sys.path.insert(0, place)
    try:
        yield
    finally:
        sys.path.remove(place)
        if place not in sys.path:
            sys.path.append(place)
