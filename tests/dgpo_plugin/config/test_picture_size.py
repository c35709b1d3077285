"""The width and the height of pictures: both or neither, and what is said of the one side that there was before."""

from __future__ import annotations

import pytest

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.load import load_config, parse_config
from tests.conftest import REQUIRED

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(("given", "side"), [(512, "512"), (None, "null"), ({}, "null")])
def test_the_one_side_of_squares_is_told_as_width_and_height(given: object, side: str) -> None:
    message = f"model.resolution: is width and height now; write width: {side}, height: {side}"
    with pytest.raises(UserError, match=message):
        parse_config({**REQUIRED, "model": {"path": "a", "resolution": given}}, "here")


def test_it_is_told_on_the_command_line_too() -> None:
    with pytest.raises(UserError, match="model.resolution: is width and height now; write width: 64, height: 64"):
        load_config("shapes", ["model.resolution=64"])


@pytest.mark.parametrize(("given", "missing"), [("width", "height"), ("height", "width")])
def test_one_side_alone_is_no_size(given: str, missing: str) -> None:
    with pytest.raises(UserError, match=f"model: {given} is given without {missing}; give both, or neither"):
        load_config("shapes", [f"model.{given}=64"])


def test_both_are_a_size_and_neither_is_the_models_own() -> None:
    given, own = load_config("shapes", ["model.width=64", "model.height=32"]).model, load_config("shapes").model
    assert (given.width, given.height, own.width, own.height) == (64, 32, None, None)
