"""Bytes to pictures: what is refused before it costs anything, and what a picture of each kind becomes."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from serve_tools import png

from rmt.serve.images import Limits, decode
from rmt.serve.refusals import Refused

LIMITS = Limits(max_bytes=1 << 20, max_pixels=100_000)


def refused(data: bytes, limits: Limits = LIMITS) -> tuple[int, str]:
    with pytest.raises(Refused) as caught:
        decode(data, limits)
    return caught.value.status, caught.value.reason


def saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header declares what its few bytes do not hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_every_format_is_read(kind):
    found = decode(saved(Image.new("RGB", (30, 20), (200, 40, 40)), kind), LIMITS)
    assert found.mode == "RGB" and found.size == (30, 20)
    assert np.abs(np.asarray(found).astype(int) - (200, 40, 40)).max() < 12


def test_sizes_are_refused_from_the_header_alone(monkeypatch):
    def no(*args):
        raise AssertionError("it was decoded")

    sound = png()
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", no)
    assert refused(bomb(1000, 101)) == (413, "image_pixels")
    assert refused(bomb(30_000, 30_000)) == (413, "image_pixels"), "what Pillow itself calls a bomb"
    assert refused(bomb(1, 50_000)) == (422, "image_aspect"), "its shorter side made 224 would be 10^12 pixels"
    assert refused(sound + b"\0" * (1 << 20)) == (413, "image_bytes")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_truncated_and_mutated_files_are_refused_or_read_but_nothing_else_happens(kind):
    rng = np.random.default_rng(0)
    noisy = Image.fromarray(rng.integers(0, 255, (60, 50, 3), dtype=np.uint8))
    data = saved(noisy, kind)
    assert refused(data[: len(data) // 2]) == (422, "image_damaged")
    for _ in range(150):
        broken = bytearray(data)
        for at in rng.integers(0, len(data), 8):
            broken[at] = rng.integers(256)
        try:
            assert decode(bytes(broken), LIMITS).mode == "RGB"
        except Refused as error:
            assert error.status in (413, 415, 422)


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 100, b"GIF89a", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"BM", b"RIFF1234WEBP"]
)
def test_what_is_no_image_is_refused(data):
    assert refused(data)[0] in (415, 422)


def test_formats_that_are_not_needed_are_not_parsed():
    image = Image.new("RGB", (9, 9))
    assert {refused(saved(image, kind)) for kind in ("TIFF", "PPM", "ICO", "TGA")} == {(415, "image_format")}


def test_exif_orientation_is_applied_and_damaged_exif_ignored():
    image = Image.new("RGB", (30, 20), "blue")
    image.paste("red", (0, 0, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode(saved(image, "JPEG", exif=exif, quality=95), LIMITS)
    assert turned.size == (20, 30) and turned.getpixel((10, 3))[0] > 200, "red was left and is now on top"
    assert decode(saved(image, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), LIMITS).size == (30, 20)


def test_other_modes_become_rgb():
    grey16 = Image.fromarray(np.full((4, 5), 0x8080, np.uint16))
    assert decode(saved(grey16, "PNG"), LIMITS).getpixel((0, 0)) == (128, 128, 128), "scaled, not clipped to white"
    assert decode(saved(Image.new("L", (5, 4), 77), "PNG"), LIMITS).getpixel((0, 0)) == (77, 77, 77)
    assert decode(saved(Image.new("1", (5, 4), 1), "PNG"), LIMITS).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("RGB", (5, 4), (10, 200, 30)).quantize(4)
    assert decode(saved(palette, "PNG"), LIMITS).getpixel((0, 0)) == (10, 200, 30)
    assert decode(saved(Image.new("RGBA", (5, 4), (9, 8, 7, 128)), "PNG"), LIMITS).getpixel((0, 0)) == (9, 8, 7)
    red, green, blue = decode(saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"), LIMITS).getpixel((8, 8))
    assert red > 200 and green < 60 and blue < 60


def test_of_an_animation_the_first_picture_is_taken():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        red, green, _ = decode(data, LIMITS).getpixel((4, 4))
        assert red > 200 and green < 60
