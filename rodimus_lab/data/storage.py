"""Where data is read from and kept, and how a file is written so that it is whole or absent."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rodimus_lab.errors import UserError

SPLITS = ("train", "valid", "test")


def data_root() -> Path | None:
    """The folder of local corpora and tokenizers: `$RODIMUS_LAB_DATA`, or None where it is not set.

    Raises `UserError` where it names no folder.
    """
    value = os.environ.get("RODIMUS_LAB_DATA")
    if not value:
        return None
    root = Path(value).expanduser()
    if not root.is_dir():
        raise UserError(f"RODIMUS_LAB_DATA is {value!r}, which is not a folder; set it to one, or unset it")
    return root


def cache_root() -> Path:
    """The folder of prepared data: `$RODIMUS_LAB_CACHE`, or `data_cache/` in the project root."""
    value = os.environ.get("RODIMUS_LAB_CACHE")
    return Path(value).expanduser() if value else Path(__file__).resolve().parents[2] / "data_cache"


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path` for writing; it takes the name `path` only when the block ends well.

    Whatever goes wrong, the temporary file is removed and an older `path` stays as it was. Raises `UserError` on a
    full disk and where the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(f"the disk is full while writing {path}; free some space and run it again") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(
                f"{path} cannot be written ({error.strerror}); set RODIMUS_LAB_CACHE to another folder"
            ) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
