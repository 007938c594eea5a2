"""The packages of the extra `data`, imported when an input needs them."""

from __future__ import annotations

import importlib
from types import ModuleType

from phase8.errors import DataError


def import_for(path: str, module: str, file_format: str) -> ModuleType:
    """Imports a module that an input format needs.

    Args:
        path: The input.
        module: The module.
        file_format: Format of the input, for the message.

    Raises:
        DataError: Its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise DataError(f"{path} is {file_format}, which needs the package {package}: pip install 'phase8[data]'") from error


def import_zstandard(path: str) -> ModuleType:
    """The package that reads zstd.

    Raises:
        DataError: It is not installed.
    """
    return import_for(path, "zstandard", "compressed by zstd")


def import_parquet(path: str) -> ModuleType:
    """The module that reads Parquet.

    Raises:
        DataError: Its package is not installed.
    """
    return import_for(path, "pyarrow.parquet", "a Parquet file")
