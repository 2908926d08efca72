"""Images as bytes and as arrays. This project writes PNG, which is lossless; it reads JPEG and WebP as well.

Legend: I channels, H, W image size.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Shape = tuple[int, int, int]
"""(I, H, W) of an image."""

Pixels = NDArray[np.uint8]

SUFFIXES = ("png", "jpg", "jpeg", "webp")
"""Of a shard's members: what is read as an image."""

FORMATS = ("PNG", "JPEG", "WEBP")


def decoded(content: bytes, shape: tuple[int, int, int] | None = None) -> NDArray[np.uint8]:
    """Bytes of an image -> uint8 [I, H, W]. Raises ValueError if it is not 8-bit grey or RGB, or not of the shape.

    Raises OSError if it is damaged.
    """
    try:
        opened = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    except UnidentifiedImageError as error:  # whose own text names an address in memory
        raise ValueError("no PNG, JPEG or WebP image begins there" if content else "the image is empty") from error
    with opened as picture:
        channels = {"L": 1, "RGB": 3}.get(picture.mode)
        found = (channels, picture.height, picture.width)
        # Pillow cuts 16-bit colour to 8 bits without a word: only the decoder's argument tells.
        if any(";16" in str(tile) for tile in picture.tile):
            raise ValueError(f"image has 16 bits a channel ({picture.mode}), but should have 8")
        if channels is None or (shape is not None and found != shape):
            raise ValueError(f"image is {picture.mode} {found[1]}x{found[2]}, but should be {shape or 'grey or RGB'}")
        pixels = np.asarray(picture)
    return pixels[None] if channels == 1 else np.moveaxis(pixels, -1, 0)


def png_bytes(image: NDArray[np.uint8]) -> bytes:
    """uint8 [I, H, W] -> PNG bytes."""
    out = io.BytesIO()
    Image.fromarray(image[0] if image.shape[0] == 1 else np.moveaxis(image, 0, -1)).save(out, "png")
    return out.getvalue()
