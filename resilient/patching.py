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


# The patches of each attribute, the oldest first, so that they can be undone in any order.
_stacks: dict[tuple[int, str], list[Patch]] = {}
_lock = threading.RLock()


class Patch:
    """The handle of one patch. `undo()` it, or use it as a context manager."""

    def __init__(self, path: str, policy: Callable[[Any], Any]) -> None:
        if not isinstance(path, str):
            raise TypeError(f"path must be a string, not {path!r}")
        module, colon, attribute = path.partition(":")
        if not (module and colon and attribute):
            raise ValueError(f"path must look like 'package.module:Class.attribute', not {path!r}")
        if not callable(policy):
            raise TypeError(f"policy must be a policy or a Pipeline, not {policy!r}")
        self.path = path
        self._module, self._attribute, self._policy = module, attribute, policy
        self._undone = False
        self._place: tuple[Any, str, Any, bool] | None = None

    @property
    def applied(self) -> bool:
        """Whether the guarded attribute is in place: not before the module is imported, not after `undo`."""
        return self._place is not None and not self._undone

    def undo(self) -> None:
        """Put back what was there, in any order of several patches; twice does no harm.

        Before the module is imported it cancels the patch.
        """
        with _lock:
            if self._undone:
                return
            self._undone = True
            if self._place is None:
                return
            parent, name, original, own = self._place
            stack = _stacks[id(parent), name]
            above = stack[stack.index(self) + 1 :]
            stack.remove(self)
            if not stack:
                del _stacks[id(parent), name]
            if not above and not own:
                delattr(parent, name)
                return
            # Patches that came later stay: what they guard now is what this one guarded.
            for later in above:
                later._place = (parent, name, original, own)
                original, own = later._policy(original), True
            setattr(parent, name, original)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = "undone" if self._undone else "applied" if self._place else "waiting for the import"
        return f"<patch of {self.path}: {state}>"

    def _apply(self, module: Any) -> None:
        import wrapt

        with _lock:
            if self._undone:
                return
            parent, name, original = wrapt.resolve_path(module, self._attribute)
            own = name in vars(parent)
            wrapt.apply_patch(parent, name, self._policy(original))
            self._place = (parent, name, original, own)
            _stacks.setdefault((id(parent), name), []).append(self)


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
