"""The outside of an image file: its format, its size, its rotation, and whether it is all there.

Everything here is read from headers and chunk lengths, without decoding a pixel: a file is known
to be small enough and complete before a decoder sees it. Metadata never reaches the decoder, for
a bad comment, colour profile or EXIF block must not cost the image (nor make the decoder warn).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from struct import unpack_from

from cnnray.errors import ImageError

MAX_JPEG_SCANS = 100
"""Progressive files have about ten; each one visits every pixel, so thousands are an attack."""

MAX_GIF_PIXELS = 89_478_485
"""Above this Pillow's GIF reader warns, and a warning is the whole process's."""

# Formats that are images but not accepted: (offset, signature, name).
_REFUSED = (
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "BigTIFF"),
    (0, b"MM\0+", "BigTIFF"),
    (0, b"II\xbc\x01", "JPEG XR"),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"\0\0\2\0", "CUR"),
    (0, b"icns", "ICNS"),
    (0, b"8BPS", "PSD"),
    (0, b"%!PS", "EPS"),
    (0, b"\xc5\xd0\xd3\xc6", "EPS"),
    (0, b"%PDF-", "PDF"),
    (0, b"gimp xcf", "XCF"),
    (0, b"\x8aMNG\r\n\x1a\n", "MNG"),
    (0, b"\x8bJNG\r\n\x1a\n", "JNG"),
    (0, b"v/1\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"DDS ", "DDS"),
    (0, b"qoif", "QOI"),
    (0, b"FLIF", "FLIF"),
    (0, b"BPG\xfb", "BPG"),
    (0, b"AT&TFORM", "DjVu"),
    (0, b"FUJIFILMCCD-RAW", "RAF"),
    (0, b"\xd7\xcd\xc6\x9a", "WMF"),
    (40, b" EMF", "EMF"),
    (0, b"SIMPLE  =", "FITS"),
    (128, b"DICM", "DICOM"),
    (0, b"\x01\xda", "SGI"),
    (0, b"\x59\xa6\x6a\x95", "Sun raster"),
    *((0, b"P%d%c" % (kind, space), "PNM") for kind in range(1, 8) for space in b" \t\r\n"),
    *(
        (4, b"ftyp" + brand, "HEIC/AVIF")
        for brand in (b"avi", b"hei", b"hev", b"mif1", b"msf1", b"miaf", b"MiHE")
    ),
)

_BMP_HEADER_SIZES = (12, 40, 52, 56, 64, 108, 124)
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_STANDALONE = frozenset((0x00, 0x01, *range(0xD0, 0xD9)))
# APP0 and APP14 stay: they tell the decoder how colour is coded.
_JPEG_METADATA = frozenset((*range(0xE1, 0xEE), 0xEF, 0xFE))
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))


@dataclass(frozen=True, slots=True)
class Container:
    """A complete file: its format, the coded size, EXIF's orientation (1 to 8), what to decode."""

    format: str
    width: int
    height: int
    orientation: int
    data: bytes


def read_container(data: bytes, *, max_pixels: int) -> Container:
    """Recognise a file by its content and read its header.

    Raises ``ImageError``: ``empty``, ``not_image``, ``format_not_allowed``, ``too_large`` (which
    comes first, since a bomb need not be complete), ``truncated``, ``corrupt``.
    """
    if not data:
        raise ImageError("empty", "0 bytes")
    name = _recognise(data)
    try:
        return _READERS[name](data, max_pixels)
    except (struct.error, IndexError):
        raise ImageError("truncated", f"{name} ends early, at byte {len(data)}") from None


def check_pixels(width: int, height: int, *, max_pixels: int) -> None:
    """Raise ``ImageError`` ``too_large`` for more than ``max_pixels``, ``corrupt`` for none."""
    if width * height > max_pixels:
        raise ImageError("too_large", f"{width} x {height} pixels, the limit is {max_pixels}")
    if width * height == 0:
        raise ImageError("corrupt", f"{width} x {height} pixels")


def _recognise(data: bytes) -> str:
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG"):
        return "PNG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"RIFF") and b"WEBP".startswith(data[8:12]):
        return "WEBP"
    if _is_bmp(data):
        return "BMP"
    for offset, signature, name in _REFUSED:
        if data.startswith(signature, offset):
            raise ImageError("format_not_allowed", name)
    if _is_svg(data):
        raise ImageError("format_not_allowed", "SVG")
    raise ImageError("not_image", f"starts with {data[:12]!r}")


def _is_bmp(data: bytes) -> bool:
    """Two letters are no signature: text may start with BM. Ask for a known header, too."""
    if not data.startswith(b"BM"):
        return False
    if len(data) < 18:  # too short for its header: the reserved bytes are all there is to go by
        return len(data) > 6 and not any(data[6:10])
    return int.from_bytes(data[14:18], "little") in _BMP_HEADER_SIZES


def _is_svg(data: bytes) -> bool:
    head = data[:2048].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    is_markup = head.startswith((b"<svg", b"<?xml", b"<!--", b"<!doctype svg"))
    return is_markup and b"<svg" in head and b"<html" not in head


def _read_jpeg(data: bytes, max_pixels: int) -> Container:
    kept, end, orientation = [data[:2]], 2, 1
    width = height = marker = 0
    is_progressive = False
    while marker != 0xDA:  # start of scan: coded pixels follow
        position, marker = _next_jpeg_marker(data, end)
        end = position + 2 + unpack_from(">H", data, position + 2)[0]
        if marker in _JPEG_FRAMES:
            height, width = unpack_from(">HH", data, position + 5)
            is_progressive = marker & 3 == 2
            check_pixels(width, height, max_pixels=max_pixels)
        if marker not in _JPEG_METADATA:
            kept.append(data[position:end])
        elif marker == 0xE1 and orientation == 1:
            orientation = _exif_orientation(data[position + 4 : end])
    _check_jpeg_scans(data, end, is_progressive=is_progressive)
    is_plain = sum(map(len, kept)) == end
    pixels = data if is_plain else b"".join((*kept, data[end:]))
    return Container("JPEG", width, height, orientation, pixels)


def _next_jpeg_marker(data: bytes, position: int) -> tuple[int, int]:
    """The next segment's position and marker, past padding and markers that stand alone."""
    while (position := data.find(b"\xff", position)) >= 0:
        marker = data[position + 1]
        if marker == 0xD9:
            raise ImageError("corrupt", "JPEG without an image")
        if marker != 0xFF and marker not in _JPEG_STANDALONE:
            return position, marker
        position += 1 if marker == 0xFF else 2
    raise ImageError("truncated", "JPEG ends within its header")


def _check_jpeg_scans(data: bytes, start: int, *, is_progressive: bool) -> None:
    """Look for the end of the image, which coded pixels cannot imitate: they escape 0xff."""
    if data.rfind(b"\xff\xd9", start) < 0:
        raise ImageError("truncated", "JPEG without its end marker")
    if is_progressive:
        num_scans = 1 + data.count(b"\xff\xda", start, data.find(b"\xff\xd9", start))
        if num_scans > MAX_JPEG_SCANS:
            raise ImageError("corrupt", f"JPEG of {num_scans} scans, the limit is {MAX_JPEG_SCANS}")


def _read_png(data: bytes, max_pixels: int) -> Container:
    header = _PNG_SIGNATURE + b"\0\0\0\rIHDR"
    if not data.startswith(header[: len(data)]):
        raise ImageError("corrupt", "PNG with a damaged signature")
    width, height = unpack_from(">II", data, 16)
    check_pixels(width, height, max_pixels=max_pixels)
    kept, position, orientation, kind = [_PNG_SIGNATURE], 8, 1, b""
    while kind != b"IEND":
        length, kind = unpack_from(">I4s", data, position)
        end = position + 12 + length
        if not kind.isalpha():
            raise ImageError("corrupt", f"PNG with a chunk {kind!r}")
        if end > len(data):
            raise ImageError("truncated", f"PNG ends within its chunk {kind!r}")
        if kind in _PNG_PIXELS:
            kept.append(data[position:end])
        elif kind == b"eXIf":
            orientation = _exif_orientation(data[position + 8 : end - 4])
        position = end
    is_plain = sum(map(len, kept)) == position
    return Container("PNG", width, height, orientation, data if is_plain else b"".join(kept))


def _read_webp(data: bytes, max_pixels: int) -> Container:
    end = 8 + unpack_from("<I", data, 4)[0]
    width, height = _webp_size(data)
    check_pixels(width, height, max_pixels=max_pixels)
    if end > len(data):
        raise ImageError("truncated", f"WEBP of {end} bytes ends at byte {len(data)}")
    position, orientation = 12, 1
    while position + 8 <= end:
        kind, length = unpack_from("<4sI", data, position)
        if kind == b"EXIF":
            orientation = _exif_orientation(data[position + 8 : position + 8 + length])
        position += 8 + length + length % 2
    return Container("WEBP", width, height, orientation, data)


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        (bits,) = unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        low_width, high_width, low_height, high_height = unpack_from("<HBHB", data, 24)
        return (high_width << 16 | low_width) + 1, (high_height << 16 | low_height) + 1
    if len(kind) < 4:
        raise ImageError("truncated", "WEBP ends within its header")
    raise ImageError("corrupt", f"WEBP starts with chunk {kind!r}")


def _read_gif(data: bytes, max_pixels: int) -> Container:
    width, height, flags = unpack_from("<HHB", data, 6)
    position, has_frame = 13 + _gif_palette_bytes(flags), False
    max_pixels = min(max_pixels, MAX_GIF_PIXELS)
    if width and height:  # else the first frame gives the size
        check_pixels(width, height, max_pixels=max_pixels)
    while (block := data[position]) != 0x3B:
        if block == 0x21:
            position = _skip_gif_blocks(data, position + 2)
        elif block == 0x2C:
            left, top, columns, rows, flags = unpack_from("<HHHHB", data, position + 1)
            if not has_frame:  # a frame that sticks out of the screen widens it
                width, height = max(width, left + columns), max(height, top + rows)
                check_pixels(width, height, max_pixels=max_pixels)
            has_frame = True
            position = _skip_gif_blocks(data, position + 11 + _gif_palette_bytes(flags))
        elif has_frame:  # padding or junk where the trailer should be
            break
        else:
            raise ImageError("corrupt", f"GIF with an unknown block {block:#04x}")
    if not has_frame:
        raise ImageError("corrupt", "GIF without an image")
    return Container("GIF", width, height, 1, data)


def _gif_palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _skip_gif_blocks(data: bytes, position: int) -> int:
    while size := data[position]:
        position += size + 1
    return position + 1


def _read_bmp(data: bytes, max_pixels: int) -> Container:
    offset, header_size = unpack_from("<II", data, 10)
    if header_size == 12:
        width, height, _, bits = unpack_from("<HHHH", data, 18)
        is_packed, packed_bytes = False, 0
    else:
        width, height, _, bits, coding, packed_bytes = unpack_from("<iiHHII", data, 18)
        is_packed = coding not in (0, 3)  # 0: plain, 3: plain with channel masks
    if width < 0:
        raise ImageError("corrupt", f"BMP of width {width}")
    height = abs(height)
    check_pixels(width, height, max_pixels=max_pixels)
    size = packed_bytes if is_packed else (width * bits + 31) // 32 * 4 * height
    if offset + size > len(data):
        raise ImageError("truncated", f"BMP of {offset + size} bytes ends at byte {len(data)}")
    return Container("BMP", width, height, 1, data)


def _exif_orientation(payload: bytes) -> int:
    """The orientation tag of an EXIF block, 1 to 8; 1 (upright) when it has none or is broken."""
    tiff = payload.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (directory,) = unpack_from(order + "I", tiff, 4)
        (count,) = unpack_from(order + "H", tiff, directory)
        for entry in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind = unpack_from(order + "HH", tiff, entry)
            if tag == 0x0112:
                (value,) = unpack_from(order + ("I" if kind == 4 else "H"), tiff, entry + 8)
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


_READERS: dict[str, Callable[[bytes, int], Container]] = {
    "JPEG": _read_jpeg,
    "PNG": _read_png,
    "WEBP": _read_webp,
    "GIF": _read_gif,
    "BMP": _read_bmp,
}
