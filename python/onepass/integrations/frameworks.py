"""The import of a training framework, with an error that names the package to install."""

from __future__ import annotations

import importlib
from typing import Any


def import_framework(*modules: str, package: str) -> Any:
    """Imports the first of several modules that is installed.

    Args:
        modules: names of modules, the preferred one first.
        package: the package to install if none of them is installed.

    Raises:
        ImportError: none of the modules is installed, or one is installed and fails to import.
    """
    for name in modules:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # the framework is installed, and a package that it needs is not
    raise ImportError(
        f"this module of onepass.integrations needs the package {package}, which is not "
        f"installed: pip install {package}",
        name=modules[0],
    )
