"""Guard code that one does not own: replace an attribute by its guarded self, and take that back.

`patch("requests:Session.request", pipeline)` finds the attribute, or waits for the module to be imported. The
call itself costs no more than a decorated function. Patching is for start-up: it is safe from any thread, but a call
under way goes on with what it began with.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["Patch", "patch"]


class Patch:
    """The handle of one patch. `undo()` it, or use it as a context manager."""

    def __init__(self, path: str, policy: Callable[[Any], Any]) -> None:
        module, colon, attribute = path.partition(":")
        if not (module and colon and attribute):
            raise ValueError(f"path must look like 'package.module:Class.attribute', not {path!r}")
        if not callable(policy):
            raise TypeError(f"policy must be a policy or a Pipeline, not {policy!r}")
        self.path = path
        self._module, self._attribute, self._policy = module, attribute, policy
        self._lock = threading.Lock()
        self._undone = False
        self._place: tuple[Any, str, Any, bool] | None = None

    @property
    def applied(self) -> bool:
        """Whether the guarded attribute is in place: not before the module is imported, not after `undo`."""
        return self._place is not None and not self._undone

    def undo(self) -> None:
        """Put back what was there. Doing it twice does no harm; before the module is imported it cancels the patch."""
        with self._lock:
            if self._undone:
                return
            self._undone = True
            if self._place is None:
                return
            parent, name, original, own = self._place
            if own:
                setattr(parent, name, original)
            else:
                delattr(parent, name)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = "undone" if self._undone else "applied" if self._place else "waiting for the import"
        return f"<patch of {self.path}: {state}>"

    def _apply(self, module: Any) -> None:
        import wrapt

        with self._lock:
            if self._undone:
                return
            parent, name, original = wrapt.resolve_path(module, self._attribute)
            own = name in vars(parent)
            wrapt.apply_patch(parent, name, self._policy(original))
            self._place = (parent, name, original, own)


def patch(path: str, policy: Callable[[Any], Any]) -> Patch:
    """Guard the attribute at `path` (`"package.module:Class.method"`) with a policy or a `Pipeline`.

    If the module is not imported yet, the patch waits until it is. Raises `AttributeError` at once if the module is
    there and the attribute is not.
    """
    made = Patch(path, policy)
    module = sys.modules.get(made._module)
    if module is not None:
        made._apply(module)
    else:
        import wrapt

        wrapt.when_imported(made._module)(made._apply)
    return made
