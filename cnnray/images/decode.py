"""Turn the bytes of an image file into pixels, whatever the bytes. Not for resizing.

JPEG, PNG, WebP, BMP and GIF are recognised by their content; the first frame is decoded and EXIF's
orientation applied. Every kind of file has one result:

* palettes and CMYK/YCCK become RGB as Pillow converts them, without colour profiles
* transparency, by an alpha channel or a transparent colour, is composited over white
* 16 bits a channel keep their high byte

JPEG files of the usual kind are decoded by libjpeg-turbo alone, half as fast again as through
Pillow, which decodes all else and has the last word on damage. Both give the same pixels.

Nothing global is touched or consulted: no Pillow setting, no warning filter; calls may run in
any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Protocol

import numpy as np
import simplejpeg
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from cnnray.errors import MAX_ERROR_DETAIL, ImageError
from cnnray.images.containers import Container, check_pixels, read_container

# Image.open would add nothing but a warning for big images, which one thread cannot silence
# without silencing all; the readers themselves do not warn, and containers checks the size.
_READERS: dict[str, Callable[[BytesIO], Image.Image]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
}

_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    # EXIF 2.32, tag 0x0112: how to turn the stored pixels upright
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}

_GREY_MODES = frozenset(("1", "L", "LA", "I;16", "I;16B", "I"))


class Limits(Protocol):
    """What one image may cost at most: that is ``cnnray.options.DecodeLimits``.

    A protocol, since pydantic would nearly double what it takes to start a process that decodes.
    """

    @property
    def max_pixels(self) -> int:
        """Width times height."""

    @property
    def max_bytes(self) -> int:
        """Of the file."""


def _default_limits() -> Limits:
    from cnnray.options import DEFAULT_LIMITS

    return DEFAULT_LIMITS


@dataclass(frozen=True, slots=True)
class Decoded:
    """An upright image: ``pixels`` (H, W, C) uint8, C-contiguous; whether the file is grey.

    ``height`` and ``width`` are the file's, in pixels: larger than H and W if it was reduced.
    """

    pixels: np.ndarray
    is_grey: bool
    height: int
    width: int


def decode_image(
    data: bytes,
    *,
    channels: int = 3,
    limits: Limits | None = None,
    min_side: int | None = None,
) -> Decoded:
    """Decode the first frame to RGB (3 channels) or to luma (1 channel, ITU-R 601-2).

    With ``min_side``, a large image may come reduced by 2, 4 or 8, its short side not below that
    many pixels: a JPEG decoder then computes no more of it than that.
    Raises ``ImageError`` with a code of ``cnnray.errors.IMAGE_ERROR_CODES``, and nothing else for
    any bytes: ``truncated`` when the file ends early, ``corrupt`` for other damage.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    limits = limits or _default_limits()
    if len(data) > limits.max_bytes:
        raise ImageError("too_large", f"{len(data)} bytes, the limit is {limits.max_bytes}")
    container = read_container(data, max_pixels=limits.max_pixels)
    try:
        coded = _decode_jpeg(container, channels=channels, min_side=min_side) or _decode(
            container, channels=channels, limits=limits
        )
    except ImageError:
        raise
    except Exception as error:  # decoders raise nearly anything for hostile bytes
        raise _image_error(error, format_name=container.format) from error
    sides = (coded.height, coded.width)
    height, width = sides if container.orientation < 5 else sides[::-1]
    pixels = np.ascontiguousarray(_UPRIGHT[container.orientation](coded.pixels))
    return Decoded(pixels=pixels, is_grey=coded.is_grey, height=height, width=width)


def _decode_jpeg(container: Container, *, channels: int, min_side: int | None) -> Decoded | None:
    """An undamaged JPEG in grey or YCbCr as it is stored; None for anything else."""
    if container.format != "JPEG":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(container.data)
        is_grey = colours == "Gray"
        if not (is_grey or (colours == "YCbCr" and channels == 3)):  # Pillow's luma is that of RGB
            return None
        factor = _reduction(min(height, width), min_side)
        pixels = simplejpeg.decode_jpeg(
            container.data,
            "RGB" if channels == 3 else "GRAY",
            fastdct=False,
            fastupsample=False,
            min_height=-(-height // factor),
            min_width=-(-width // factor),
        )
    except ValueError:  # Pillow says what is wrong, or bears it
        return None
    return Decoded(pixels, is_grey, height, width)


def _reduction(side: int, min_side: int | None) -> int:
    if min_side is None:
        return 1
    return next((factor for factor in (8, 4, 2) if side >= factor * min_side), 1)


def _decode(container: Container, *, channels: int, limits: Limits) -> Decoded:
    """Any accepted file as it is stored. Raises whatever Pillow does."""
    image = _READERS[container.format](BytesIO(container.data))
    check_pixels(*image.size, max_pixels=limits.max_pixels)
    is_grey = image.mode in _GREY_MODES
    image = _opaque(image)
    target = "L" if channels == 1 else "RGB"
    if image.mode != target:
        image = image.convert(target)
    pixels = np.array(image).reshape(image.height, image.width, channels)
    return Decoded(pixels, is_grey, image.height, image.width)


def _opaque(image: Image.Image) -> Image.Image:
    """The same image without transparency and with at most 8 bits a channel."""
    image.load()  # some readers know only now whether there is transparency
    if image.mode.startswith("I"):
        return _high_byte(image)
    if not image.has_transparency_data:
        return image
    is_grey = image.mode in _GREY_MODES
    layered = image.convert("LA" if is_grey else "RGBA")
    opaque = Image.new("L" if is_grey else "RGB", image.size, "white")
    opaque.paste(layered.convert(opaque.mode), mask=layered.getchannel("A"))
    return opaque


def _high_byte(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits: Pillow's own conversion clips it."""
    wide = np.asarray(image)
    grey = (wide >> 8).astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        grey[wide == transparent] = 255
    return Image.fromarray(grey)


def _image_error(error: Exception, *, format_name: str) -> ImageError:
    message = str(error) or type(error).__name__
    if isinstance(error, MemoryError | Image.DecompressionBombError):
        code = "too_large"
    else:
        code = "truncated" if "truncated" in message.lower() else "corrupt"
    return ImageError(code, _printable(f"{format_name}: {message}"))


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text[:MAX_ERROR_DETAIL])
