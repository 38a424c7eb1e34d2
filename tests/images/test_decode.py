from __future__ import annotations

import io
import random
import resource
import struct
import threading
import time
import warnings
import zipfile
import zlib
from copy import copy

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from cnnray.errors import IMAGE_ERROR_CODES, MAX_ERROR_DETAIL, ImageError
from cnnray.images.decode import Decoded, decode_image
from cnnray.options import DecodeLimits

# A warning of Pillow's that leaks would be the whole process's.
pytestmark = pytest.mark.filterwarnings("error")

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
LOSSLESS = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}


def error_of(data, **arguments) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode_image(data, **arguments)
    error = caught.value
    assert error.code in IMAGE_ERROR_CODES
    assert len(error.detail) <= MAX_ERROR_DETAIL
    assert error.detail.isprintable()
    return error


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int, *, bits: int = 8, color: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)


def insert_png_chunk(data: bytes, chunk: bytes) -> bytes:
    return data[:33] + chunk + data[33:]  # 33: signature and IHDR


def orientation_exif(value: int, *, order: str = "<", kind: int = 3) -> bytes:
    """A TIFF block with the orientation tag alone."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    field = struct.pack(order + ("H2x" if kind == 3 else "I"), value)
    return mark + struct.pack(order + "IHHHI", 8, 1, 0x0112, kind, 1) + field + bytes(4)


# --- what decodes, and to what


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_decodes_to_its_pixels(name, encode, picture):
    image = picture.quantize(256) if name == "GIF" else picture
    decoded = decode_image(encode(image, name, **LOSSLESS.get(name, {})))
    expected = np.asarray(image.convert("RGB"), dtype=int)
    assert decoded.pixels.shape == (20, 30, 3)
    assert np.abs(decoded.pixels - expected).max() <= (4 if name == "JPEG" else 0)


def test_pixels_are_contiguous_writable_uint8(valid_files):
    for data in valid_files.values():
        for channels in (1, 3):
            pixels = decode_image(data, channels=channels).pixels
            assert pixels.dtype == np.uint8
            assert pixels.shape[2] == channels
            assert pixels.flags.c_contiguous
            assert pixels.flags.writeable


def test_every_kind_of_file_looks_like_pillows_rgb(valid_files):
    opaque = [name for name in valid_files if "palette" not in name and "exif" not in name]
    for name in set(opaque) - {"GIF animated", "PNG grey"}:
        with Image.open(io.BytesIO(valid_files[name])) as image:
            expected = np.asarray(image.convert("RGB"))
        np.testing.assert_array_equal(decode_image(valid_files[name]).pixels, expected, name)


def test_one_channel_is_luma(encode, picture):
    decoded = decode_image(encode(picture, "PNG"), channels=1)
    np.testing.assert_array_equal(decoded.pixels[:, :, 0], np.asarray(picture.convert("L")))
    assert not decoded.is_grey


def test_grey_file_repeats_its_channel(encode, picture):
    grey = picture.convert("L")
    decoded = decode_image(encode(grey, "PNG"))
    assert decoded.is_grey
    for channel in range(3):
        np.testing.assert_array_equal(decoded.pixels[:, :, channel], np.asarray(grey))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16"])
def test_modes_without_color_are_grey(mode, encode, picture):
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 4), 1000, dtype=np.uint16))
    else:
        image = picture.convert(mode)
    assert decode_image(encode(image, "PNG")).is_grey


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_grey_is_scaled_not_clipped(channels, encode):
    wide = np.array([[0, 255, 256], [4096, 32768, 65535]], dtype=np.uint16)
    decoded = decode_image(encode(wide, "PNG"), channels=channels)
    np.testing.assert_array_equal(decoded.pixels[:, :, 0], [[0, 0, 1], [16, 128, 255]])


def test_one_bit_is_black_and_white(encode):
    image = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert("1")
    decoded = decode_image(encode(image, "PNG"), channels=1)
    np.testing.assert_array_equal(decoded.pixels[:, :, 0], [[0, 255], [255, 0]])


def test_cmyk_becomes_rgb(encode):
    # no cyan, all magenta, all yellow, no black: red
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    decoded = decode_image(encode(image, "JPEG", quality=100))
    assert not decoded.is_grey
    assert np.abs(decoded.pixels[8, 8].astype(int) - (255, 0, 0)).max() <= 4


@pytest.mark.parametrize("name", ["PNG", "WEBP", "BMP"])
def test_alpha_is_composited_over_white(name, encode):
    pixels = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 128]]], dtype=np.uint8)
    options = {"lossless": True, "exact": True} if name == "WEBP" else {}
    data = bitfield_bmp(pixels) if name == "BMP" else encode(pixels, name, **options)
    expected = [[[255, 0, 0], [255, 255, 255], [127, 127, 127]]]
    np.testing.assert_array_equal(decode_image(data).pixels, expected)


def bitfield_bmp(rgba: np.ndarray) -> bytes:
    """A BMP with channel masks: Pillow writes alpha without them, but reads it only with them."""
    height, width = rgba.shape[:2]
    masks = struct.pack("<IIII", 0xFF, 0xFF00, 0xFF0000, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, width, -height, 1, 32, 3, 0, 0, 0, 0, 0) + masks
    header += bytes(108 - len(header))
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 122) + header + rgba.tobytes()


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_with_alpha_is_composited_over_white(channels, encode):
    pixels = np.array([[[10, 255], [10, 0], [0, 128]]], dtype=np.uint8)
    decoded = decode_image(encode(Image.fromarray(pixels, "LA"), "PNG"), channels=channels)
    assert decoded.is_grey
    np.testing.assert_array_equal(decoded.pixels[0, :, 0], [10, 255, 127])


def palette_image() -> Image.Image:
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return image


@pytest.mark.parametrize("name", ["PNG", "GIF"])
def test_palette_becomes_its_colors(name, encode):
    decoded = decode_image(encode(palette_image(), name))
    assert not decoded.is_grey
    np.testing.assert_array_equal(decoded.pixels, [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]])


@pytest.mark.parametrize(
    ("name", "transparency", "first"),
    [("PNG", 0, 255), ("GIF", 0, 255), ("PNG", bytes([128, 255, 255]), 127)],
)
def test_transparent_palette_entry_shows_white(name, transparency, first, encode):
    data = encode(palette_image(), name, transparency=transparency)
    expected = [[[255, first, first], [0, 255, 0], [0, 0, 255]]]
    np.testing.assert_array_equal(decode_image(data).pixels, expected)


@pytest.mark.parametrize(
    ("pixels", "color", "key", "expected"),
    [
        (bytes([7, 9]), 0, struct.pack(">H", 7), [255, 9]),
        (bytes([7, 7, 7, 9, 9, 9]), 2, struct.pack(">HHH", 7, 7, 7), [255, 9]),
        (struct.pack(">HH", 300, 2304), 0, struct.pack(">H", 300), [255, 9]),
    ],
    ids=["grey", "rgb", "grey16"],
)
def test_transparent_color_shows_white(pixels, color, key, expected):
    bits = 16 if len(pixels) == 4 else 8
    data = png_header(2, 1, bits=bits, color=color) + png_chunk(b"tRNS", key)
    data += png_chunk(b"IDAT", zlib.compress(b"\0" + pixels)) + png_chunk(b"IEND", b"")
    np.testing.assert_array_equal(decode_image(data, channels=1).pixels[0, :, 0], expected)


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation_is_decoded(name, encode):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
    options = {"lossless": True} if name == "WEBP" else {}
    data = encode(frames[0], name, save_all=True, append_images=frames[1:], **options)
    assert (decode_image(data).pixels == (255, 0, 0)).all()


# --- metadata: orientation is applied, the rest cannot do harm


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(name, value, encode, picture):
    exif = Image.Exif()
    exif[0x0112] = value
    data = encode(picture, name, exif=exif, **LOSSLESS.get(name, {}))
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    decoded = decode_image(data)
    np.testing.assert_array_equal(decoded.pixels, expected)
    assert decoded.pixels.shape == ((20, 30, 3) if value < 5 else (30, 20, 3))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [3, 4], ids=["short", "long"])
def test_exif_orientation_is_read_in_either_byte_order(order, kind, encode, picture):
    exif = orientation_exif(6, order=order, kind=kind)
    assert decode_image(encode(picture, "PNG", exif=exif)).pixels.shape == (30, 20, 3)


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"II*\0",
        b"garbage that is no TIFF block",
        orientation_exif(9),
        orientation_exif(0),
        orientation_exif(6)[:-8],
        b"II*\0\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\xff\xff" + bytes(20),
    ],
)
def test_broken_exif_rotates_nothing(exif, encode, picture):
    plain = encode(picture, "PNG")
    damaged = insert_png_chunk(plain, png_chunk(b"eXIf", exif))
    np.testing.assert_array_equal(decode_image(damaged).pixels, decode_image(plain).pixels)


def test_broken_metadata_of_jpeg_costs_nothing(encode, picture):
    plain = encode(picture, "JPEG")
    bodies = [
        (0xE1, b"Exif\0\0II*\0\x08\0\0\0\x05\0" + b"\xff" * 40),
        (0xE2, b"MPF\0" + b"\xff" * 40),
        (0xE2, b"ICC_PROFILE\0\x07\x09"),
        (0xED, b"Photoshop 3.0\0" + b"8BIM\xff\xff\xff"),
        (0xFE, b""),
    ]
    segments = b"".join(
        struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for marker, body in bodies
    )
    damaged = plain[:2] + segments + plain[2:]
    np.testing.assert_array_equal(decode_image(damaged).pixels, decode_image(plain).pixels)


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(8_000_000))),
        png_chunk(b"iCCP", b"icc\0\0garbage"),
        png_chunk(b"acTL", b"\0\0\0\0\0\0\0\0"),  # makes Pillow warn
        png_chunk(b"fcTL", b"\0"),
        png_chunk(b"gAMA", b"")[:-1] + b"!",  # a wrong checksum
        png_chunk(b"pHYs", b"\0"),
    ],
    ids=["zTXt bomb", "iCCP", "acTL", "fcTL", "gAMA", "pHYs"],
)
def test_broken_metadata_of_png_costs_nothing(chunk, encode, picture):
    plain = encode(picture, "PNG")
    damaged = insert_png_chunk(plain, chunk)
    np.testing.assert_array_equal(decode_image(damaged).pixels, decode_image(plain).pixels)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_trailing_bytes_are_ignored(name, valid_files):
    data = valid_files[name]
    padded = data + b"\0\0trailing \xff\xda"
    np.testing.assert_array_equal(decode_image(padded).pixels, decode_image(data).pixels)


# --- what does not decode, and why


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("image.jpg", b"\xff\xd8\xff")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        b"hello, I am a text file\n",
        b"BM is how this text starts, too",
        b"BMW",
        b"<!DOCTYPE html><html><body><svg></svg></body></html>",
        b"<html><img src='a.png'></html>",
        b'{"a": 1}',
        b"RIFF\x24\0\0\0WAVEfmt ",
        b"\0\0\0\x18ftypmp42\0\0\0\0",
        b"\x1b[31mterminal escape\x07\0",
        "\u202eright to left".encode(),
        zip_bytes(),
        bytes(1000),
    ],
)
def test_other_content_is_not_an_image(data):
    assert error_of(data).code == "not_image"


@pytest.mark.parametrize(
    "data",
    [
        b"%PDF-1.7\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\xef\xbb\xbf <?xml version='1.0'?>\n<!-- drawing -->\n<svg/>",
        b"\0\0\0\x1cftypavif\0\0\0\0",
        b"\0\0\0\x18ftypheic\0\0\0\0",
        b"\0\0\0\x0cjP  \r\n\x87\n",
        b"\xff\x4f\xff\x51\0",
        b"\0\0\0\x0cJXL \r\n\x87\n",
        b"\xff\x0a\0\0",
        b"8BPS\0\1",
        b"P6\n1 1\n255\n\0\0\0",
    ],
)
def test_other_image_formats_are_not_allowed(data):
    assert error_of(data).code == "format_not_allowed"


@pytest.mark.parametrize("name", ["TIFF", "ICO", "ICNS", "PPM", "DDS", "JPEG2000", "AVIF"])
def test_formats_that_pillow_could_read_are_not_allowed(name, encode, picture):
    assert error_of(encode(picture.resize((32, 32)), name)).code == "format_not_allowed"


def test_no_bytes_is_empty():
    assert error_of(b"").code == "empty"


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.8, 0.95])
def test_cut_file_is_truncated(fraction, valid_files):
    for name, data in valid_files.items():
        assert error_of(data[: int(len(data) * fraction)]).code == "truncated", name


def test_file_without_its_last_byte_is_truncated(valid_files):
    for name, data in valid_files.items():
        assert error_of(data[:-1]).code == "truncated", name


def test_jpeg_without_its_end_marker_is_truncated(encode, picture):
    for side in range(8, 40):  # for some sizes the decoder itself does not miss the marker
        for mode in ("L", "RGB", "CMYK"):
            data = encode(picture.convert(mode).resize((side, side)), "JPEG", quality=30)
            assert error_of(data[:-1]).code == "truncated"
            assert error_of(data[:-2]).code == "truncated"


def test_every_cut_is_an_image_error(valid_files):
    for name, data in valid_files.items():
        step = max(1, len(data) // 200)
        for cut in (*range(min(len(data), 60)), *range(60, len(data), step)):
            assert error_of(data[:cut]).code in ("empty", "not_image", "truncated"), (name, cut)


def test_complete_file_whose_pixels_end_early_are_truncated():
    rows = b"".join(b"\0" + random.Random(0).randbytes(30) for _ in range(20))
    pixels = png_chunk(b"IDAT", zlib.compress(rows, level=0)[:300])
    data = png_header(30, 20, color=0) + pixels + png_chunk(b"IEND", b"")
    assert error_of(data).code == "truncated"


def test_damaged_pixels_are_corrupt(encode, picture):
    data = bytearray(encode(picture, "PNG"))
    start = data.index(b"IDAT") + 4
    data[start : start + 8] = b"\xff" * 8
    assert error_of(bytes(data)).code == "corrupt"


def test_line_ending_damage_is_corrupt(encode, picture):
    damaged = encode(picture, "PNG").replace(b"\r\n", b"\n")
    assert error_of(damaged).code == "corrupt"


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8\xff\xd9",
        png_header(4, 4) + png_chunk(b"IEND", b""),
        b"GIF89a\x04\0\x04\0\0\0\0;",
        b"RIFF\x16\0\0\0WEBPJUNK\x0a\0\0\0" + bytes(10),
        b"BM" + struct.pack("<IHHIIiiHHI", 0, 0, 0, 54, 40, 0, 0, 1, 24, 0) + bytes(40),
    ],
)
def test_file_without_an_image_is_corrupt(data):
    assert error_of(data).code == "corrupt"


def test_progressive_jpeg_with_endless_scans_is_corrupt(encode, picture):
    data = encode(picture, "JPEG", progressive=True)
    scan = data.rindex(b"\xff\xda")
    bomb = data[:scan] + data[scan:-2] * 200 + data[-2:]
    assert "scans" in error_of(bomb).detail


def test_error_detail_is_short_and_printable(encode, picture, monkeypatch):
    def explode(self):
        raise OSError("\x1b[2J" + "long\n" * 100)

    monkeypatch.setattr(ImageFile.ImageFile, "load", explode)
    error = error_of(encode(picture, "BMP"))  # error_of checks the detail
    assert error.code == "corrupt"
    assert copy(error).detail == error.detail


# --- limits


def jpeg_header(width: int, height: int) -> bytes:
    return b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 17, 8, height, width, 3) + bytes(9)


def webp_header(width: int, height: int) -> bytes:
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + sizes


def gif_bomb() -> bytes:
    frame = b",\0\0\0\0\xff\xff\xff\xff\0\x02\0"  # a 65535 x 65535 frame on a 1 x 1 screen
    return b"GIF89a\x01\0\x01\0\0\0\0!\xf9\x04\x08\0\0\0\0" + frame + b";"


@pytest.mark.parametrize(
    "data",
    [
        png_header(13_000, 13_000),
        png_header(2**31 - 1, 2**31 - 1),
        png_header(13_000, 13_000, color=0)
        + png_chunk(b"IDAT", zlib.compress(bytes(100_000)))
        + png_chunk(b"IEND", b""),
        jpeg_header(65_535, 65_535),
        webp_header(16_383, 16_383),
        gif_bomb(),
        b"BM" + struct.pack("<IHHIIiiHHI", 0, 0, 0, 54, 40, 2**30, 2**30, 1, 1, 0) + bytes(40),
        b"BM" + struct.pack("<IHHIIiiHHI", 0, 0, 0, 54, 40, 50_000, -50_000, 1, 8, 1) + bytes(40),
    ],
    ids=["png", "png max", "png complete", "jpeg", "webp", "gif", "bmp", "bmp rle"],
)
def test_bomb_is_too_large_before_anything_is_allocated(data):
    decode_image(b"BM" + struct.pack("<IHHIIHHHH", 0, 0, 0, 26, 12, 1, 1, 1, 24) + bytes(4))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert error_of(data).code == "too_large"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 20_000


def test_max_pixels_is_inclusive(valid_files):
    for data in valid_files.values():
        decode_image(data, limits=DecodeLimits(max_pixels=600))  # 30 x 20
        assert error_of(data, limits=DecodeLimits(max_pixels=599)).code == "too_large"


def test_max_bytes_is_inclusive(valid_files):
    data = valid_files["PNG"]
    decode_image(data, limits=DecodeLimits(max_bytes=len(data)))
    assert error_of(data, limits=DecodeLimits(max_bytes=len(data) - 1)).code == "too_large"


def test_second_frame_header_cannot_raise_the_size(encode, picture):
    data = encode(picture, "JPEG")
    frame = data.index(b"\xff\xc0")
    large = b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, 60_000, 60_000, 3) + data[frame + 10 :]
    assert error_of(data[:frame] + large).code == "too_large"


def test_image_between_the_limits_of_pillow_does_not_warn(monkeypatch, encode, picture):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # 600 would warn in Image.open
    for name in FORMATS:
        decode_image(encode(picture, name))


def test_pillows_own_limit_is_too_large(monkeypatch, encode, picture):
    data = encode(picture, "WEBP")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert error_of(data).code == "too_large"


@pytest.mark.parametrize("values", [{"max_pixels": 0}, {"max_bytes": 0}])
def test_limits_must_be_positive(values):
    with pytest.raises(ValueError, match="greater than 0"):
        DecodeLimits(**values)


def test_channels_must_be_one_or_three(valid_files):
    with pytest.raises(ValueError, match="channels"):
        decode_image(valid_files["PNG"], channels=4)


# --- for any bytes


def mutate(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Flip bits, overwrite, delete, or splice in a piece of another file; headers above all."""
    mutant = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at = rng.randrange(min(len(mutant), 80) if rng.random() < 0.5 else len(mutant))
        action = rng.randrange(5)
        if action == 0:
            mutant[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            mutant[at] = rng.randrange(256)
        elif action == 2:
            mutant[at : at + 4] = rng.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"])
        elif action == 3 and len(mutant) > 40:
            del mutant[at : at + rng.randrange(1, 20)]
        else:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            mutant[at:at] = other[start : start + rng.randrange(60)]
    return bytes(mutant)


def outcome_of(data: bytes, *, channels: int, limits: DecodeLimits) -> str:
    """``ok`` or the error's code; anything else that is raised fails the test."""
    try:
        pixels = decode_image(data, channels=channels, limits=limits).pixels
    except ImageError as error:
        is_clean = error.detail.isprintable() and len(error.detail) <= MAX_ERROR_DETAIL
        return error.code if is_clean else repr(error)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == channels
    assert pixels.shape[0] * pixels.shape[1] <= limits.max_pixels
    return "ok"


def test_mutants_decode_within_limits_or_fail_with_a_code(valid_files):
    rng, limits = random.Random(20240607), DecodeLimits(max_pixels=100_000)
    files, outcomes, deadline = list(valid_files.values()), set(), time.monotonic() + 2
    while time.monotonic() < deadline:
        for data in files:
            mutant = mutate(data, files, rng)
            outcomes.add(outcome_of(mutant, channels=rng.choice([1, 3]), limits=limits))
    assert outcomes <= {"ok", *IMAGE_ERROR_CODES}
    assert outcomes >= {"ok", "corrupt", "truncated", "too_large", "not_image"}


def test_random_bytes_after_a_signature_are_an_image_error():
    rng = random.Random(7)
    for signature in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\xff\0\0\0WEBPVP8 "):
        for _ in range(50):
            error_of(signature + rng.randbytes(rng.randrange(400)))


def test_threads_decode_alike_and_leave_global_state_alone(valid_files):
    filters, setting = list(warnings.filters), ImageFile.LOAD_TRUNCATED_IMAGES
    expected = {name: decode_image(data).pixels for name, data in valid_files.items()}
    results: list[Decoded] = []

    def decode_all():
        results.extend(decode_image(data) for data in valid_files.values())

    threads = [threading.Thread(target=decode_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 * len(valid_files)
    assert sum(r.pixels.sum(dtype=int) for r in results) == 4 * sum(
        pixels.sum(dtype=int) for pixels in expected.values()
    )
    assert warnings.filters == filters
    assert setting is ImageFile.LOAD_TRUNCATED_IMAGES is False


# --- the two decoders of JPEG, and reduction


def noise(height: int, width: int, *, blob: int = 4) -> Image.Image:
    """Blobs of colour of some pixels: with few, every coefficient matters."""
    shape = (height // blob, width // blob, 3)
    small = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"subsampling": 1}], ids=str)
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_has_the_pixels_that_pillow_gives_it(encode, options, progressive, mode):
    data = encode(noise(203, 301).convert(mode), "JPEG", progressive=progressive, **options)
    for channels, target in ((3, "RGB"), (1, "L")):
        found = decode_image(data, channels=channels)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert(target)).reshape(203, 301, -1)
        np.testing.assert_array_equal(found.pixels, expected)
        assert found.is_grey == (mode == "L")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["JPEG", "PNG"])
def test_every_orientation_turns_as_pillow_turns_it(encode, orientation, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(noise(40, 60), name, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    found = decode_image(data)
    np.testing.assert_array_equal(found.pixels, expected)
    assert (found.height, found.width) == expected.shape[:2]
    assert found.pixels.flags.c_contiguous


@pytest.mark.parametrize(("min_side", "factor"), [(401, 1), (400, 1), (200, 2), (100, 4), (9, 8)])
def test_a_large_jpeg_is_reduced_but_not_below_the_side_that_is_asked_for(encode, min_side, factor):
    exif = Image.Exif()
    exif[0x0112] = 6
    found = decode_image(encode(noise(400, 602), "JPEG", exif=exif), min_side=min_side)
    assert found.pixels.shape == (-(-602 // factor), 400 // factor, 3)
    assert (found.height, found.width) == (602, 400)


def test_a_reduced_jpeg_looks_like_the_whole_one(encode):
    data = encode(noise(400, 600, blob=25), "JPEG", quality=95)
    reduced = decode_image(data, min_side=200).pixels.astype(float)
    whole = Image.fromarray(decode_image(data).pixels).reduce(2)
    assert np.abs(reduced - np.asarray(whole)).mean() < 3


def test_other_formats_are_not_reduced(encode):
    assert decode_image(encode(noise(400, 600), "PNG"), min_side=10).pixels.shape == (400, 600, 3)
