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
