"""Folders that appear whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import SciflowError


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A scratch folder that becomes `folder` by one rename when the block ends without an error.

    Killed or failed half way, `folder` does not exist. Of two processes that make the same folder at once the
    first one's stays, and the second is content with it.

    Raises:
        SciflowError: `folder` is a file, or holds something already.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SciflowError(f"`folder` is {str(folder)!r}, which is not an empty folder: name another or delete it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        whole = Path(scratch) / folder.name
        whole.mkdir()
        yield whole
        try:
            os.replace(whole, folder)
        except OSError:
            if not (folder.is_dir() and any(folder.iterdir())):
                raise
