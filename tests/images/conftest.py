"""Small images, made in memory: a photo-like picture and its encoded forms."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

Encode = Callable[..., bytes]


@pytest.fixture(scope="session")
def encode() -> Encode:
    def encode_image(image: Image.Image | np.ndarray, format: str, **options: Any) -> bytes:
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        return buffer.getvalue()

    return encode_image


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """30 wide, 20 high, smooth and without symmetry, so that every flip and turn shows."""
    y, x = np.mgrid[0:20, 0:30]
    red, green, blue = 8 * x, 12 * y, 255 - 4 * (x + y)
    return Image.fromarray(np.stack([red, green, blue], axis=2).astype(np.uint8))


@pytest.fixture(scope="session")
def valid_files(encode: Encode, picture: Image.Image) -> dict[str, bytes]:
    """Complete files of every accepted format and of the variants that have their own code."""
    exif = Image.Exif()
    exif[0x0112] = 6
    palette, turned = picture.convert("P"), picture.rotate(90)
    return {
        "JPEG": encode(picture, "JPEG"),
        "JPEG exif": encode(picture, "JPEG", exif=exif),
        "JPEG progressive": encode(picture, "JPEG", progressive=True),
        "JPEG cmyk": encode(picture.convert("CMYK"), "JPEG"),
        "PNG": encode(picture, "PNG"),
        "PNG exif": encode(picture, "PNG", exif=exif),
        "PNG palette": encode(palette, "PNG", transparency=bytes(range(100))),
        "PNG grey": encode(picture.convert("L"), "PNG", transparency=7),
        "PNG alpha": encode(picture.convert("LA"), "PNG"),
        "PNG animated": encode(picture, "PNG", save_all=True, append_images=[turned]),
        "WEBP": encode(picture, "WEBP"),
        "WEBP exif": encode(picture, "WEBP", exif=exif),
        "WEBP lossless": encode(picture.convert("RGBA"), "WEBP", lossless=True),
        "WEBP animated": encode(picture, "WEBP", save_all=True, append_images=[turned]),
        "GIF": encode(picture.convert("L"), "GIF"),
        "GIF animated": encode(
            palette, "GIF", save_all=True, append_images=[palette.rotate(90)], transparency=3
        ),
        "BMP": encode(picture, "BMP"),
        "BMP palette": encode(palette, "BMP"),
        "BMP grey": encode(picture.convert("L"), "BMP"),
    }
