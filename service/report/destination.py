"""Files that a command is told to write: proven writable before hours are spent on what goes into them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from experiments.errors import UserError

PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


def refuse_unwritable(*options: tuple[str, Path | None]) -> None:
    """
    Args:
        options: (option, file) as given on the command line; no file is fine.

    Raises:
        UserError: A file has no folder, is one, or cannot be written.
    """
    for option, file in options:
        if file is None:
            continue
        folder = file.absolute().parent
        if not folder.is_dir():
            raise UserError(f"{option}: no folder at {str(folder)!r}")
        if file.is_dir():
            raise UserError(f"{option}: {str(file)!r} is a folder; name a file")
        try:
            with file.open("r+b") if file.exists() else tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(f"{option}: {str(file)!r} cannot be written: {error.strerror or error}") from None


def refuse_other_than_pictures(*options: tuple[str, Path | None]) -> None:
    """
    Raises:
        UserError: A file's suffix says no format that can be drawn.
    """
    for option, file in options:
        if file is not None and file.suffix not in PICTURE_SUFFIXES:
            raise UserError(f"{option}: {file.name!r} is no picture's name; it must end in {', '.join(PICTURE_SUFFIXES)}")
