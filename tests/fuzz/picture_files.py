"""Files of pictures that are right, odd, broken or huge, made from a seed."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

from PIL import Image


def picture(draw: random.Random) -> bytes:
    """A picture's file: right, odd, broken, or huge."""
    size = draw.choice([(1, 1), (2, 3), (8, 8), (1, 64), (64, 1)])
    mode = draw.choice(["RGB", "RGB", "L", "LA", "RGBA", "P", "1", "I;16", "CMYK", "HSV", "F"])
    made = Image.new(mode if mode not in ("HSV",) else "RGB", size, 1)
    if mode == "P":
        made.putpalette([draw.randrange(256) for _ in range(3 * draw.choice([1, 16, 256]))])
    form = {"CMYK": "JPEG", "F": "TIFF"}.get(mode) or draw.choice(["PNG"] * 6 + ["GIF", "BMP", "WEBP"])
    options: dict[str, Any] = {}
    if form == "PNG":
        exif = Image.Exif()
        exif[0x0112] = draw.randrange(10)
        options = draw.choice(
            [
                {},
                {"exif": exif},
                {"transparency": 0},
                {"dpi": (1, 1)},
                {"icc_profile": b"no profile"},
                {"optimize": True},
            ]
        )
        if mode in ("RGB", "I;16", "RGBA", "LA", "1"):
            options.pop("transparency", None)
        if mode in ("RGB", "RGBA", "L") and draw.random() < 0.2:
            options |= {"save_all": True, "append_images": [made] * 3}
    out = io.BytesIO()
    try:
        made.save(out, format=form, **options)
    except (OSError, TypeError, ValueError):  # a mode that the format has not; Pillow 10.1 trips over it
        made.convert("RGB").save(out, format="PNG")
    return _odd_file(draw, out.getvalue())


def _odd_file(draw: random.Random, data: bytes) -> bytes:
    """A picture's file as it is, or damaged, or with another head or chunk."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    def declared() -> bytes:
        width, height = (draw.choice([0, 1, 5, 8193, 60_000, 2**31 - 1, 2**32 - 1]) for _ in range(2))
        head = struct.pack(
            ">IIBBBBB",
            width,
            height,
            draw.choice([1, 2, 8, 16, 99]),
            draw.choice([0, 2, 3, 4, 6, 7]),
            0,
            0,
            draw.randrange(3),
        )
        return (
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"x" * 99)) + chunk(b"IEND", b"")
        )

    def with_chunk() -> bytes:
        bomb = zlib.compress(b"a" * 3_000_000)
        kind, content = draw.choice(
            [
                (b"zTXt", b"key\0\0" + bomb),
                (b"iCCP", b"key\0\0" + bomb),
                (b"iTXt", b"key\0\1\0\0\0" + bomb),
                (b"tEXt", b"key"),
                (b"eXIf", draw.randbytes(40)),
                (b"acTL", struct.pack(">II", draw.choice([0, 2, 2**31]), 0)),
                (b"tRNS", draw.randbytes(draw.randrange(9))),
                (b"PLTE", draw.randbytes(draw.randrange(9))),
                (b"gAMA", draw.randbytes(draw.randrange(6))),
            ]
        )
        return data[:33] + chunk(kind, content) + data[33:]

    def flipped() -> bytes:
        damaged = bytearray(data)
        for _ in range(draw.randrange(1, 9)):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        return bytes(damaged)

    kinds: list[Callable[[], bytes]] = [
        lambda: data,
        lambda: data,
        lambda: data[: draw.randrange(len(data))],
        lambda: data + draw.randbytes(99),
        flipped,
        declared,
        with_chunk,
    ]
    return draw.choice(kinds)()
