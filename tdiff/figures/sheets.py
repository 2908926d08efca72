"""Many small images as one PNG: what a browser then shows is one picture, whose gaps let the page through.

Legend: K images, I channels, H image size.
"""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from tdiff.figures.contents import Pixels

SMALLEST = 16
"""Pixels that a tile has at least, so that a gap of one pixel is thin beside it."""

SHOWN = 40
"""CSS pixels over which a tile is shown at least, by a whole factor of the image's own."""


@dataclass(frozen=True)
class Sheet:
    """A grid of `count` tiles in rows of `columns`, each `tile` pixels wide, `gap` between them."""

    png: bytes
    count: int
    columns: int
    tile: int
    gap: int
    shown: int
    """CSS pixels over which a tile is best shown."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels of the PNG."""
        rows = math.ceil(self.count / self.columns)
        step = self.tile + self.gap
        return self.columns * step - self.gap, rows * step - self.gap

    @property
    def shown_width(self) -> float:
        """Width in CSS pixels over which the whole sheet is best shown."""
        return self.size[0] * self.shown / self.tile

    @property
    def uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def sheet(images: Pixels, columns: int) -> Sheet:
    """The images [K, I, H, H], row by row. Raises ValueError if there are none."""
    stack = np.asarray(images)
    if stack.ndim != 4 or not len(stack) or stack.shape[1] not in (1, 3) or columns < 1:
        raise ValueError(f"a sheet needs images [K, 1 or 3, H, H] and a column, not {list(stack.shape)}, {columns}")
    count, channels, size = stack.shape[:3]
    factor = math.ceil(SMALLEST / size)
    tile = size * factor
    columns = min(columns, count)
    empty = Sheet(b"", count, columns, tile, max(1, tile // 20), size * math.ceil(SHOWN / size))
    step, (width, height) = tile + empty.gap, empty.size
    page = np.zeros((height, width, channels + 1), np.uint8)
    for k, image in enumerate(stack):
        top, left = k // columns * step, k % columns * step
        page[top : top + tile, left : left + tile, :-1] = image.transpose(1, 2, 0).repeat(factor, 0).repeat(factor, 1)
        page[top : top + tile, left : left + tile, -1] = 255
    out = io.BytesIO()
    Image.fromarray(page).save(out, "png", optimize=True)
    return replace(empty, png=out.getvalue())
