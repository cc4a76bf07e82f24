# SPDX-License-Identifier: Apache-2.0
"""One image file's bytes, which may be hostile, to checked 8-bit pixels.

The header is judged before a pixel is decoded, so a small file that claims an enormous image costs
nothing. The format is found from the content, never from the name, among `FORMATS` alone: Pillow knows
others (EPS starts Ghostscript), which are not images here.
"""

from __future__ import annotations

import io
import math
import threading
import warnings
from contextlib import nullcontext
from typing import TYPE_CHECKING

from torch import Tensor

from wavedp.data.resize import Fit, fit_picture
from wavedp.errors import BadFileError
from wavedp.extras import import_extra

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
MAX_FILE_BYTES = 2**26
MAX_PIXELS = 2**26
MAX_SIDE = 2**15
LISTED_BEFORE = "listed before; one image is one record"
_LARGE = 2**24
_ONE_LARGE_AT_A_TIME = threading.Lock()  # bounds the memory of threads that decode side by side


class BadImageError(BadFileError):
    """A file that is not an image wavedp accepts: its name and the reason."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{printable(file)}: {reason}")
        self.file = file
        self.reason = reason


def printable(text: str) -> str:
    """``text`` with control characters and broken Unicode escaped: safe to print to a terminal or a log."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def decode_picture(
    content: bytes, file: str, image_size: int, channels: int, *, fit: Fit = "crop", background: int = 0
) -> Tensor:
    """The image in ``content`` by the rule of :mod:`wavedp.data.resize`.

    The first frame of an animation is used, and a camera's EXIF orientation is applied.

    Args:
        content: the whole file.
        file: its name, for the error.

    Returns:
        uint8 ``[channels, image_size, image_size]``.

    Raises:
        BadImageError: for anything that does not decode to the last row, or exceeds `MAX_FILE_BYTES`,
            `MAX_PIXELS` (67 million) or `MAX_SIDE` (32,768).
        ImportError: if Pillow is missing (``pip install 'wavedp[data]'``).
    """
    Image = import_extra("PIL.Image", "data")
    ImageOps = import_extra("PIL.ImageOps", "data")
    if not content:
        raise BadImageError(file, "the file is empty (0 bytes)")
    if len(content) > MAX_FILE_BYTES:
        raise BadImageError(file, f"larger than {MAX_FILE_BYTES} bytes, the most one image file may have")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
                _check_header(picture, file)
                with _ONE_LARGE_AT_A_TIME if math.prod(picture.size) > _LARGE else nullcontext():
                    picture.load()
                    upright = ImageOps.exif_transpose(picture)
                    return fit_picture(upright, image_size, channels, fit=fit, background=background)
        except BadImageError:
            raise
        except Image.DecompressionBombError as error:
            raise BadImageError(file, f"the header claims too many pixels ({error})") from error
        except Image.UnidentifiedImageError:
            raise BadImageError(file, f"not a readable image (accepted: {', '.join(FORMATS)})") from None
        except Exception as error:
            # A damaged file makes Pillow's decoders raise whatever the damage leads to: OSError,
            # SyntaxError, struct.error, zlib.error, IndexError, ... All mean one thing here.
            reason = printable(str(error)) or type(error).__name__
            raise BadImageError(file, f"damaged or truncated image ({reason})") from error


def _check_header(picture: Image.Image, file: str) -> None:
    width, height = picture.size
    if width < 1 or height < 1:
        raise BadImageError(file, f"the image is {width} x {height} pixels")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise BadImageError(
            file,
            f"the header claims {width} x {height} pixels; at most {MAX_PIXELS} pixels "
            f"and {MAX_SIDE} a side are decoded",
        )
