"""How a model of ours passes `isinstance(model, peft.PeftModel)` without inheriting from it."""

from __future__ import annotations

import sys
from typing import Any

PACKAGE = "peft"


class Reported:
    """Reports PEFT's class of the same name as its `__class__`, if the program has imported `peft`.

    transformers' Trainer, accelerate and TRL decide by `isinstance(model, peft.PeftModel)` whether a checkpoint is an
    adapter or a whole model. Python's `isinstance` looks at `type(model)` and then at `model.__class__`; the second is
    answered here. Inheriting instead would bring dozens of methods that work on PEFT's own layers and would be wrong
    here in silence. `type(model)` stays ours, and `isinstance` with our classes holds as well. `peft` is never
    imported from here: where it is not installed, nobody can ask for its classes.

    Copying, pickling and changing the class (FSDP does) go by `type(model)`.
    """

    __class__ = property(
        lambda self: reported_class(type(self)), lambda self, kind: take_class(self, kind)
    )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Rebuild by `type(self)`: pickle would compare it with the reported class and refuse."""
        return blank, (type(self),), self.__getstate__()


def blank(kind: type) -> Any:
    """Return an instance without its state; pickle and copy fill it in."""
    return object.__new__(kind)


def reported_class(kind: type) -> type:
    """Return PEFT's class of the same name as the nearest of ours, or the class itself without `peft`."""
    theirs = sys.modules.get(PACKAGE)
    for one in kind.__mro__:
        if one.__module__.startswith("sideroad.peft") and one is not Reported:
            found = getattr(theirs, one.__name__, None)
            if isinstance(found, type):
                return found
    return kind


def take_class(instance: Any, kind: type) -> None:
    """Change an instance's class to one that was derived from the reported class, our class put in its place."""
    ours, theirs = type(instance), reported_class(type(instance))
    if theirs in kind.__bases__ and not issubclass(kind, ours):
        bases = tuple(ours if base is theirs else base for base in kind.__bases__)
        inherited = ("__dict__", "__weakref__")
        kind = type(kind.__name__, bases, {k: v for k, v in vars(kind).items() if k not in inherited})
    object.__dict__["__class__"].__set__(instance, kind)
