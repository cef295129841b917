"""Bytes that a stranger sent, to an RGB picture: what is refused, before it costs anything, and why."""

from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

from .refusals import Refused

if TYPE_CHECKING:
    from PIL.Image import Image

# Decoders that people's pictures need. TIFF, PSD, EPS and the rest are left out: a decoder is where attacks get in.
# MPO, several JPEGs in one, comes with JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# Resizing the shorter side to the model's 224 makes 224 x 22400 of the longest that is let through; of one line of
# 20 million pixels it would make 10^12.
MAX_ASPECT = 100
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Limits:
    """Of one image: bytes as sent, pixels as its header declares them."""

    max_bytes: int = 10 << 20
    max_pixels: int = 25_000_000


def decode(data: bytes, limits: Limits) -> "Image":
    """The picture as people see it: RGB, 8 bits, upright, the first of an animation; an alpha channel is dropped.

    As `rmt eval` reads images, but for two: the EXIF orientation is applied, and 16-bit greys are scaled, not clipped.
    Sizes are checked on the header, before anything is decoded.

    Raises: Refused.
    """
    from PIL import Image

    if len(data) > limits.max_bytes:
        raise Refused(413, "image_bytes", f"an image must have at most {limits.max_bytes} bytes, got {len(data)}")
    if not data:
        raise Refused(422, "empty", "an image must have bytes, got none")
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise Refused(413, "image_pixels", f"an image must have at most {limits.max_pixels} pixels: {error}") from error
    except Image.UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise Refused(415, "image_format", f"an image must be one of {known}, got something else") from error
    # Whatever else a parser raises on bytes made to break it: struct.error, SyntaxError, KeyError, zlib.error.
    except Exception as error:
        raise Refused(422, "image_damaged", f"the image's header cannot be read: {error}") from error
    with image:
        _check_size(image.size, limits)
        try:
            image.load()
            return _rgb(_upright(image))
        except Exception as error:
            raise Refused(422, "image_damaged", f"the image ({image.format}) cannot be decoded: {error}") from error


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        message = f"an image must have at most {limits.max_pixels} pixels, got {width} x {height}"
        raise Refused(413, "image_pixels", message)
    if min(size) < 1 or max(size) > MAX_ASPECT * min(size):
        raise Refused(422, "image_aspect", f"an image's sides must be within 1:{MAX_ASPECT}, got {width} x {height}")


def _upright(image: "Image") -> "Image":
    from PIL import ImageOps

    try:
        turned = image.getexif().get(_ORIENTATION, 1) in range(2, 9)
        return ImageOps.exif_transpose(image) if turned else image
    # Damaged EXIF beside good pixels is common, and no reason to refuse them.
    except Exception:
        return image


def _rgb(image: "Image") -> "Image":
    from PIL import Image

    if image.mode.startswith("I"):
        import numpy as np

        # Pillow clips 16-bit greys to 255: all white.
        values = np.asarray(image).astype(np.float32).clip(0, 65535)
        image = Image.fromarray((values / 257 + 0.5).astype(np.uint8), "L")
    return image.convert("RGB")
