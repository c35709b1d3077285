"""Names of layers that match nothing are errors, each with the names that were perhaps meant."""

from __future__ import annotations

from typing import Any

import pytest

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import LoraConfig, ModelConfig
from dgpo_plugin.config.load import load_config
from dgpo_plugin.models import load_model
from dgpo_plugin.models.policy import Policy, adapted_layers

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(ModelConfig(path="shapes"))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("attn.nope",), "no linear layer of the denoiser ends with 'attn.nope'"),
        (("attn.to_q", "attn.nope"), "'attn.nope'"),
        (("attn.to_k", "to_quer"), "'to_quer'; did you mean '.*to_q"),
        (("to_qs",), "did you mean 'to_q'"),
        (("attn.toq",), "did you mean 'attn.to_q'"),
        (("add_q_prjo",), "did you mean 'add_q_proj'"),
        (("ff.net.0.porj",), "did you mean 'ff.net.0.proj'"),
        (("o_q",), "no linear layer of the denoiser ends with 'o_q'"),
        (("",), "ends with ''"),
        (("TO_Q",), "ends with 'TO_Q'"),
        (("xxxxxxxx",), "there are "),
        (("pos_embed.proj",), "'pos_embed.proj' is Conv2d, and adapters are for linear layers"),
        (("attn",), "'attn' is Attention, and adapters are for linear layers"),
        (("wrong_one", "wrong_two"), "'wrong_one'.*'wrong_two'"),
        ((), "lora.target_modules is empty, so nothing would be trained"),
    ],
)
def test_a_name_that_matches_no_layer(model: Any, targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Policy(model, LoraConfig(target_modules=targets), seed=0)
    assert str(caught.value).startswith("lora.target_modules")
    assert "\n" not in str(caught.value)


def test_an_empty_list_is_known_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match="lora.target_modules is empty"):
        load_config("shapes", ["lora.target_modules=[]"])


def test_names_that_match_are_taken_and_null_is_the_familys(model: Any) -> None:
    assert all(name.endswith("attn.to_q") for name in adapted_layers(model, ("attn.to_q",)))
    whole = adapted_layers(model, ("transformer_blocks.1.attn.to_q",))
    assert whole == ["transformer_blocks.1.attn.to_q"]
    assert set(adapted_layers(model, None)) == set(adapted_layers(model, model.lora_targets[:7])) | {
        name for name in adapted_layers(model, None) if name.endswith("to_add_out")
    }
