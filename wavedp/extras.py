# SPDX-License-Identifier: Apache-2.0
"""Optional packages: imported where they are used, and when one is missing, the error says what to install."""

import importlib
from types import ModuleType

from wavedp.errors import MissingPackageError


def import_extra(module: str, extra: str) -> ModuleType:
    """Imports ``module`` (a dotted name), which the optional dependencies called ``extra`` bring.

    Raises:
        ImportError: naming the module, the command that installs the extra, and the original reason.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingPackageError(
            f"{package} is needed here: pip install 'wavedp[{extra}]' ({error})", name=package
        ) from error
