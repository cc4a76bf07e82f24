# SPDX-License-Identifier: Apache-2.0
"""What this package raises when it refuses something: one family, and each member also the builtin it stands for.

``except wavedp.WavedpError`` catches every refusal; ``except ValueError`` and so on go on working. A message is a
sentence with what was wrong, where, and what to do. docs/sharp_edges.md lists the cases. Outside the family stay the
protocols of Python (IndexError of a sequence, AttributeError of a module) and what the operating system says of its
files (OSError: no permission, disk full).
"""


class WavedpError(Exception):
    """Something was refused; nothing was changed, charged or released by the call that raised it."""


class InvalidValueError(WavedpError, ValueError):
    """An argument out of range, or of a shape, dtype or combination that has no meaning here."""


class InvalidTypeError(WavedpError, TypeError):
    """An argument of a wrong type."""


class StateError(WavedpError, RuntimeError):
    """A call that is right in itself, at the wrong time: a spent key, a budget used up, a missing backend."""


class BadFileError(InvalidValueError):
    """A file that is damaged, hostile, or not what it is taken for; the message names it."""


class MissingFileError(WavedpError, FileNotFoundError):
    """A file or folder that is not there."""


class NotAFolderError(WavedpError, NotADirectoryError):
    """A file where a folder is needed."""


class MissingPackageError(WavedpError, ImportError):
    """An optional package that is not installed; the message has the command that installs it."""
