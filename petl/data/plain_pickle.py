"""Pickle files of strangers, read as plain data: dicts, lists, strings and numbers. Every class is refused.

The annotations of RefCOCO are published as Python 2 pickles. A pickle can name any function and have it called; here
nothing is imported or called, because the lookup of names always raises. The one file of petl that unpickles.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from petl.errors import PetlError


class _PlainData(pickle.Unpickler):
    """Refuses every name, and with it every class and function."""

    def find_class(self, module: str, name: str) -> Any:
        raise PetlError(
            f"the pickle asks for {module}.{name}: refused, nothing was run. Lists of referring expressions hold plain "
            "data only; do not open this file with other programs, and get it anew from where it is published."
        )


def read_plain_pickle(file: Path) -> Any:
    """The data in a pickle, Python 2's included. Raises `PetlError` for a class inside, or a damaged file."""
    try:
        with open(file, "rb") as handle:
            return _PlainData(handle, encoding="latin1").load()
    except PetlError as error:
        raise PetlError(f"{file}: {error}") from None
    except FileNotFoundError as error:
        raise PetlError(f"file {file} does not exist.") from error
    except Exception as error:  # a damaged pickle raises anything: EOFError, ValueError, KeyError, IndexError, …
        raise PetlError(f"{file} is cut short or no pickle ({type(error).__name__}: {error}).") from error
