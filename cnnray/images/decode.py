"""Turn the bytes of an image file into pixels, whatever the bytes. Not for resizing.

JPEG, PNG, WebP, BMP and GIF are recognised by their content; the first frame is decoded and EXIF's
orientation applied. Every kind of file has one result:

* palettes and CMYK/YCCK become RGB as Pillow converts them, without colour profiles
* transparency, by an alpha channel or a transparent colour, is composited over white
* 16 bits a channel keep their high byte

Nothing global is touched or consulted: no Pillow setting, no warning filter; calls may run in
any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from cnnray.errors import ImageError
from cnnray.images.containers import check_pixels, read_container
from cnnray.schema import MAX_ERROR_DETAIL

# Image.open would add nothing but a warning for big images, which one thread cannot silence
# without silencing all; the readers themselves do not warn, and containers checks the size.
_READERS: dict[str, Callable[[BytesIO], Image.Image]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
}

_UPRIGHT = {  # EXIF 2.32, tag 0x0112: how to turn the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_GREY_MODES = frozenset(("1", "L", "LA", "I;16", "I;16B", "I"))


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """What one image may cost at most; ``max_pixels`` is checked before anything is allocated."""

    max_pixels: int = 50_000_000
    max_bytes: int = 32 * 1024 * 1024

    def __post_init__(self) -> None:
        if self.max_pixels < 1 or self.max_bytes < 1:
            raise ValueError(f"limits must be positive, got {self}")


DEFAULT_LIMITS = DecodeLimits()


@dataclass(frozen=True, slots=True)
class Decoded:
    """An upright image: ``pixels`` (H, W, C) uint8, C-contiguous; whether the file is grey."""

    pixels: np.ndarray
    is_grey: bool


def decode_image(
    data: bytes, *, channels: int = 3, limits: DecodeLimits = DEFAULT_LIMITS
) -> Decoded:
    """Decode the first frame to RGB (3 channels) or to luma (1 channel, ITU-R 601-2).

    Raises ``ImageError`` with a code of ``cnnray.schema.IMAGE_ERROR_CODES``, and nothing else for
    any bytes: ``truncated`` when the file ends early, ``corrupt`` for other damage.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    if len(data) > limits.max_bytes:
        raise ImageError("too_large", f"{len(data)} bytes, the limit is {limits.max_bytes}")
    container = read_container(data, max_pixels=limits.max_pixels)
    try:
        image = _READERS[container.format](BytesIO(container.data))
        check_pixels(*image.size, max_pixels=limits.max_pixels)
        is_grey = image.mode in _GREY_MODES
        image = _opaque(image)
        target = "L" if channels == 1 else "RGB"
        if image.mode != target:
            image = image.convert(target)
        if container.orientation != 1:
            image = image.transpose(_UPRIGHT[container.orientation])
        pixels = np.array(image)
    except ImageError:
        raise
    except Exception as error:  # decoders raise nearly anything for hostile bytes
        raise _image_error(error, format_name=container.format) from error
    return Decoded(pixels=pixels.reshape(*pixels.shape[:2], channels), is_grey=is_grey)


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
