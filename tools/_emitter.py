"""Load what ``thin_dump --format custom=FILE`` names: a Python file that writes a format of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._cli import Failure, os_error

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from thinpool.ir import Visitor

FACTORY = "create_emitter"


def load_emitter(path: str, write: Callable[[bytes], object]) -> Visitor:
    """Run the Python file at *path* and return what its ``create_emitter(write)`` makes.

    :raises Failure: the file cannot be read or run, or does not have the function
    """
    namespace: dict[str, Any] = {"__name__": FACTORY, "__file__": path}
    try:
        with open(path, "rb") as file:
            source = file.read()
        exec(compile(source, path, "exec"), namespace)
        factory = namespace[FACTORY]
        visitor: Visitor = factory(write)
    except KeyError as error:
        if error.args != (FACTORY,):
            raise emitter_failure(path, error) from error
        raise Failure(f"Custom format '{path}' has no function {FACTORY}(write)") from None
    except OSError as error:
        raise Failure(f"Couldn't read custom format '{path}': {os_error(error)}") from None
    except Exception as error:
        raise emitter_failure(path, error) from error
    return visitor


def emitter_failure(path: str, error: Exception) -> Failure:
    """Word an error that came out of the user's own code."""
    text = " ".join(str(error).split())
    return Failure(f"Custom format '{path}' failed: {type(error).__name__}: {text}")
