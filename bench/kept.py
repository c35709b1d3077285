"""Pictures that are kept for metrics of later: lossless files, told by the SHA-256 that stands in their row.

WebP without loss, at 8 bits a channel, as pictures are looked at and passed on. A metric of later reads those 8 bits,
where one that was there from the beginning saw the decoder's own numbers.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import atomic_path, read_bytes
from dgpo_plugin.common.pictures import to_image

from .pictures import Pictures
from .records import KEPT_FOLDER, NO_SEED, KeptRecord

_OVERHEAD = 1024
"""Bytes that a picture of noise may take beyond its pixels'."""


def keep(rows: Pictures, images: Tensor, folder: Path) -> Pictures:
    """Write pictures, and return their rows with the files' hashes.

    Args:
        rows: R of them.
        images: (R, 3, H, W) in [0, 1].
        folder: where all kept pictures of a comparison lie.

    Raises:
        UserError: the disk is full, or this Pillow cannot write them.
    """
    if not features.check("webp"):
        raise UserError("--keep-pictures: this Pillow was built without WebP; install Pillow from PyPI")
    hashes = []
    for row, image in enumerate(images):
        data = io.BytesIO()
        to_image(image).save(data, "WEBP", lossless=True)
        with atomic_path(folder / kept_name(rows, row)) as temporary:
            temporary.write_bytes(data.getvalue())
        hashes.append(hashlib.sha256(data.getvalue()).hexdigest())
    return replace(rows, sha256=np.array(hashes, dtype=np.str_))


def kept_name(pictures: Pictures, row: int) -> str:
    """Where a row's picture lies in the folder of kept ones: another place for every row, and always inside."""
    entry, seed = quote(str(pictures.entry[row]), safe=" ,+"), int(pictures.seed[row])
    place = f"checkpoint{int(pictures.checkpoint[row])}-guidance{float(pictures.guidance[row])!r}"
    prompts = quote(str(pictures.set[row]), safe=" ,+")
    file = f"{int(pictures.prompt[row]):04}-{int(pictures.image[row])}.webp"
    return f"{entry}{'-untrained' if seed == NO_SEED else f'-seed{seed}'}/{place}-{prompts}/{file}"


def check_kept(pictures: Pictures, folder: Path) -> None:
    """Find out that every picture that a table says was kept is there as it was.

    Raises:
        UserError: how many are missing or changed, and the first.
    """
    kept = pictures.kept()
    wrong: dict[str, list[str]] = {"missing": [], "changed": []}
    for row in kept:
        name = kept_name(pictures, int(row))
        try:
            _verified(pictures, int(row), folder)
        except OSError:
            wrong["missing"].append(name)
        except ValueError:
            wrong["changed"].append(name)
    first = next((name for names in wrong.values() for name in names), None)
    if first is not None:
        counts = " and ".join(f"{len(names)} {how}" for how, names in wrong.items() if names)
        raise UserError(
            f"kept pictures {folder}: {counts} of {len(kept)} (first: {first}); bring them back as they were, or make "
            f"the comparison again"
        )


def read_kept(pictures: Pictures, rows: list[int], folder: Path) -> Tensor:
    """Kept pictures, (N, 3, H, W) in [0, 1].

    Raises:
        UserError: one is missing, is another than was measured, or no picture of the others' size.
    """
    images = []
    for row in rows:
        where = f"kept picture {folder / kept_name(pictures, row)}"
        try:
            with Image.open(io.BytesIO(_verified(pictures, row, folder)), formats=["WEBP"]) as image:
                images.append(torch.from_numpy(np.array(image.convert("RGB"))))
        except OSError as error:
            raise UserError(f"{where}: {error.strerror or 'no WebP picture'}; bring it back as it was") from error
        except (ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{where}: {error}; bring it back as it was") from error
        if images[-1].shape != images[0].shape:
            raise UserError(f"{where}: has another size than the others; make the comparison again")
    return torch.stack(images).permute(0, 3, 1, 2).float() / 255


def kept_record(pictures: Pictures, folder: Path) -> KeptRecord | None:
    """How many pictures a table says were kept, and what their files take; None for none."""
    kept = [folder / kept_name(pictures, int(row)) for row in pictures.kept()]
    size = sum(path.stat().st_size for path in kept if path.exists())
    return KeptRecord(pictures=len(kept), megabytes=round(size / 1e6, 3)) if kept else None


def most_megabytes(pictures: int, width: int, height: int) -> float:
    """What so many kept pictures take at most: noise is not made smaller, what looks like something is."""
    return pictures * (3 * width * height + _OVERHEAD) / 1e6


def expected(pictures: int, width: int, height: int) -> str:
    """What is said before pictures are kept."""
    most = most_megabytes(pictures, width, height)
    return f"keeps {pictures:,} pictures of {width} x {height} at most, {most:,.1f} MB at most"


def counted(record: KeptRecord, folder: Path) -> str:
    """What is said once they are kept."""
    return f"kept {record.pictures:,} pictures, {record.megabytes:,.1f} MB, in {folder / KEPT_FOLDER}"


def _verified(pictures: Pictures, row: int, folder: Path) -> bytes:
    """A kept picture's file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is another than was measured.
    """
    data = read_bytes(folder / kept_name(pictures, row))
    assert pictures.sha256 is not None
    if hashlib.sha256(data).hexdigest() != pictures.sha256[row]:
        raise ValueError("is another file than the one that was measured")
    return data
