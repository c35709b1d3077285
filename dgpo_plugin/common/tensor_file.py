"""The header of a safetensors file, read alone: what the file holds, and that all of it is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import refuse_no_file
from dgpo_plugin.common.first_bytes import HEADER_LIMIT, what_instead


def tensor_header(path: Path) -> dict[str, dict[str, Any]]:
    """What a safetensors file holds, by name: ``dtype``, ``shape`` and ``data_offsets``; no tensor is read.

    Eight bytes say how long the header is, then comes the header, as JSON, then the tensors' bytes
    (https://huggingface.co/docs/safetensors: Format).

    Raises:
        UserError: the file cannot be read, is another kind of file, or is not all there.
    """
    try:
        size = refuse_no_file(path)
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            sane = 2 <= length <= min(HEADER_LIMIT, size - 8)
            header = json.loads(stream.read(length)) if sane else None
        instead = what_instead(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError:
        header, instead = None, None
    if instead is not None:
        raise UserError(f"{path} is {instead}")
    if not isinstance(header, dict):
        raise UserError(f"{path} is no safetensors file, or a damaged one; fetch it again")
    header.pop("__metadata__", None)
    try:
        expected = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (TypeError, KeyError, IndexError) as error:
        raise UserError(f"{path} has a damaged header; fetch it again") from error
    if size != expected:
        raise UserError(f"{path} has {size - expected:,} bytes more than its header says: damaged; fetch it again")
    return header
