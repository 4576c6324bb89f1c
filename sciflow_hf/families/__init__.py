"""Model families, one file each. May import `engines`, `networks`, `pipelines`, `images` and below; not `data`."""

import importlib
import pkgutil
from typing import Any

from ..errors import SciflowError

BUILT_IN = tuple(
    sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in ("base", "loading", "tokens"))
)


def load_family(name: str | type) -> type:
    """The class of a family.

    Args:
        name: a built-in name (`flux2_klein`), a dotted path (`my_package.my_module.MyFamily`), or a class.

    Raises:
        SciflowError: unknown name, or a path that does not lead to a `ModelFamily`.
    """
    from .base import ModelFamily

    found: Any = name
    if isinstance(name, str) and name in BUILT_IN:
        classes = vars(importlib.import_module(f"{__name__}.{name}")).values()
        found = next(c for c in classes if isinstance(c, type) and getattr(c, "name", None) == name)
    elif isinstance(name, str):
        module, _, attribute = name.rpartition(".")
        if not module:
            raise SciflowError(
                f"`family` {name!r} is unknown: use one of {', '.join(BUILT_IN)}, a dotted path to a class, or a class."
            )
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise SciflowError(f"`family` {name!r} cannot be imported: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, ModelFamily)):
        raise SciflowError(f"`family` {name!r} is {found!r}, not a subclass of `ModelFamily`.")
    return found


def family_named_in(source: str, name: Any) -> type:
    """The class of the built-in family that a file names; a path there would let data choose code to import.

    Raises:
        SciflowError: another name; says how to name the family in the command.
    """
    if name not in BUILT_IN:
        raise SciflowError(
            f"{source} names the family {name!r}, which is not built in ({', '.join(BUILT_IN)}), and what a file names "
            "is not imported. Name the class yourself, where you trust it: `--family my_module.MyFamily`."
        )
    return load_family(name)
