"""What a request's body says: prompts and pictures, measured before anything is decoded, or why it is refused."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dgpo_plugin.common.errors import UserError, is_unicode
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.rewards.picture_files import as_seen

MOST_PICTURES = 256
"""In a request."""
MOST_PIXELS = 2**26
"""In a request, all pictures together: 64 of 1024 x 1024. They take 12 bytes a pixel once decoded."""
DEEPEST = 64
"""Lists and tables inside each other in a prompt's metadata, at most."""


class Refusal(Exception):
    """A request that is answered with an error.

    Args:
        retry_after: seconds after which the same request may be welcome; None if that is not known.
    """

    def __init__(self, status: HTTPStatus, reason: str, retry_after: int | None = None) -> None:
        super().__init__(" ".join(reason.split()))
        self.status = status
        self.retry_after = retry_after


def read_request(body: bytes | bytearray) -> tuple[Tensor, list[Prompt]]:
    """Pictures (N, 3, H, W) in [0, 1] and N prompts.

    Raises:
        Refusal: 413 for too many pictures or pixels, 400 for all else.
    """
    content = _json_object(body, ["images", "prompts"])
    texts, prompts = content["images"], content["prompts"]
    if not isinstance(texts, list) or not isinstance(prompts, list) or len(texts) != len(prompts) or not texts:
        raise _malformed("images and prompts must be lists of the same length, at least 1")
    if len(texts) > MOST_PICTURES:
        raise Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{len(texts)} pictures, of {MOST_PICTURES} allowed; send fewer"
        )
    read = [_prompt(prompt, f"prompts[{at}]") for at, prompt in enumerate(prompts)]
    return _pictures(texts), read


def read_check_request(body: bytes | bytearray) -> list[Prompt]:
    """The prompts that are to be checked.

    Raises:
        Refusal: it is malformed.
    """
    prompts = _json_object(body, ["prompts"])["prompts"]
    if not isinstance(prompts, list):
        raise _malformed("prompts must be a list")
    return [_prompt(prompt, f"prompts[{at}]") for at, prompt in enumerate(prompts)]


def _json_object(body: bytes | bytearray, keys: Sequence[str]) -> dict[str, Any]:
    """A request's body, an object with these keys and no others."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _malformed("the body is not JSON") from error
    if not isinstance(content, dict) or content.keys() != set(keys):
        raise _malformed(f"the body must be an object with {' and '.join(keys)}")
    return content


def _prompt(content: Any, where: str) -> Prompt:
    if not isinstance(content, dict) or not {"text"} <= content.keys() <= {"text", "metadata"}:
        raise _malformed(f"{where} must be an object with text and, if it has any, metadata")
    text, metadata = content["text"], content.get("metadata", {})
    if not isinstance(text, str) or not isinstance(metadata, dict):
        raise _malformed(f"{where}: text must be a string and metadata an object")
    if not is_unicode(text):
        raise _malformed(f"{where}: text has half of a character (a lone surrogate)")
    level: list[Any] = [metadata]
    for _ in range(DEEPEST):
        inner = [each.values() if isinstance(each, dict) else each for each in level]
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
    if level:
        raise _malformed(f"{where}: metadata is nested deeper than {DEEPEST}")
    return Prompt(text, metadata)


def _pictures(texts: Sequence[Any]) -> Tensor:
    """The pictures of a request, all of one size; nothing is decoded before all sizes are known and allowed."""
    opened = [_opened(text, f"images[{at}]") for at, text in enumerate(texts)]
    width, height = opened[0].size
    for at, picture in enumerate(opened):
        if picture.size != (width, height):
            raise _malformed(f"images[{at}] is {picture.size}, images[0] {(width, height)}; send one size a request")
    if width * height * len(opened) > MOST_PIXELS:
        raise Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"{len(opened)} pictures of {width} x {height}: more than {MOST_PIXELS} pixels; send fewer or smaller ones",
        )
    images = torch.empty(len(opened), 3, height, width)
    for at, picture in enumerate(opened):
        try:
            pixels = torch.from_numpy(as_seen(picture, f"images[{at}]")).permute(2, 0, 1)
        except UserError as error:
            raise _malformed(str(error)) from error
        except MemoryError:
            raise
        except Exception as error:  # Pillow has no one class for a broken file
            raise _malformed(f"images[{at}] is a broken PNG") from error
        if pixels.shape != images[at].shape:
            raise _malformed(f"images[{at}] is turned by its EXIF data; send it upright")
        images[at] = pixels
    return images


def _opened(text: Any, where: str) -> Image.Image:
    """A picture of which only the head has been read."""
    if not isinstance(text, str):
        raise _malformed(f"{where} must be a string")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _malformed(f"{where} is not base64") from error
    try:
        return Image.open(io.BytesIO(data), formats=["PNG"])
    except Image.DecompressionBombError as error:
        raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{where} has too many pixels") from error
    except Exception as error:  # as above
        raise _malformed(f"{where} is not a PNG") from error


def _malformed(reason: str) -> Refusal:
    return Refusal(HTTPStatus.BAD_REQUEST, reason)
