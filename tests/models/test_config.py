"""A wrong configuration of a model is refused with a line that says where and what, in recipe and config.json alike."""

from __future__ import annotations

import re
from typing import Any

import pytest

from nanoworks.common.errors import UserError
from nanoworks.config.rope import SCALINGS
from nanoworks.models import config_from_dict, config_from_hf
from tests.models.families import SIZES, TINY, families

GIVEN = {"model_type": "llama", **SIZES}
KNOWN = f"known: {', '.join(families())}"
ROPES = f"known: default, {', '.join(SCALINGS)}"
LINEAR = {"rope_type": "linear", "factor": 2.0}
FACTORS = {"factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 7}
RAMP = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}

# (what is changed in GIVEN, the message after the name of what was read)
WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"num_attention_heads": 5},
        ": hidden_size 64 is not divisible by num_attention_heads 5; change one of them, or give head_dim",
    ),
    ({"num_key_value_heads": 3}, ": num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ({"num_key_value_heads": 8}, ": num_attention_heads 4 is not a multiple of num_key_value_heads 8"),
    ({"num_attention_heads": 0}, ".num_attention_heads: Input should be greater than 0 (got 0)"),
    (
        {"num_attention_heads": "four"},
        ".num_attention_heads: Input should be a valid integer, unable to parse string as an integer (got 'four')",
    ),
    ({"head_dim": 33}, ": head_dim 33 is odd; rotary embeddings rotate pairs"),
    ({"hidden_size": 60}, ": head_dim 15 is odd; rotary embeddings rotate pairs"),
    ({"hidden_size": -64}, ".hidden_size: Input should be greater than 0 (got -64)"),
    ({"hidden_size": None}, ".hidden_size: required, but not given"),
    ({"num_hidden_layers": None}, ".num_hidden_layers: required, but not given"),
    ({"num_attention_heads": None}, ".num_attention_heads: required, but not given"),
    ({"hidden_act": "gelu"}, ".hidden_act: Input should be 'silu' (got 'gelu')"),
    ({"rms_norm_eps": 0}, ".rms_norm_eps: Input should be greater than 0 (got 0)"),
    ({"rope_theta": -1.0}, ".rope_theta: Input should be greater than 0 (got -1.0)"),
    (
        {"rope_scaling": {**LINEAR, "rope_type": "yarm"}},
        f".rope_scaling: unknown rope_type 'yarm' (did you mean 'yarn'?); {ROPES}",
    ),
    ({"rope_scaling": {"factor": 2.0}}, f".rope_scaling: rope_type is missing; {ROPES}"),
    ({"rope_scaling": {"rope_type": "linear"}}, ".rope_scaling.factor: required, but not given"),
    (
        {"rope_scaling": {**LINEAR, "factor": 0.5}},
        ".rope_scaling.factor: Input should be greater than or equal to 1 (got 0.5)",
    ),
    ({"rope_scaling": {**LINEAR, "facter": 2}}, ".rope_scaling.facter: unknown key"),
    ({"rope_scaling": RAMP}, ".rope_scaling: low_freq_factor 4.0 must be below high_freq_factor 1.0"),
    (
        {"rope_scaling": {"rope_type": "longrope", **FACTORS}},
        ": rope_scaling.long_factor has 7 factors; head_dim 16 has 8 frequencies",
    ),
    ({"model_type": "mistral", "sliding_window": 0}, ".sliding_window: Input should be greater than 0 (got 0)"),
    ({"model_type": "mistral", "sliding_window": -4}, ".sliding_window: Input should be greater than 0 (got -4)"),
    (
        {"model_type": "mistral", "sliding_window": 4, "layer_types": ["full_attention"]},
        ": layer_types has 1 entries for 3 layers; give one a layer",
    ),
    (
        {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3},
        ": num_experts_per_tok 3 exceeds num_local_experts 2",
    ),
    (
        {"model_type": "mixtral", "num_experts_per_tok": 0},
        ".num_experts_per_tok: Input should be greater than 0 (got 0)",
    ),
    (
        {"model_type": "qwen3_moe", "num_experts": 2, "num_experts_per_tok": 3},
        ": num_experts_per_tok 3 exceeds num_experts 2",
    ),
    (
        {"model_type": "smollm3", "no_rope_layers": [1, 0]},
        ": no_rope_layers has 2 entries for 3 layers; give one a layer",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=lambda value: str(value)[:60])
def test_what_is_wrong_is_named(changes: dict[str, Any], message: str) -> None:
    values = {key: value for key, value in {**GIVEN, **changes}.items() if value is not None}
    for read, name in ((config_from_dict, "model"), (config_from_hf, "config.json")):
        with pytest.raises(UserError, match=f"^{re.escape(name + message)}$"):
            read(values)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("mistrl", f"unknown model_type 'mistrl' (did you mean 'mistral'?); {KNOWN}"),
        ("bert", f"unknown model_type 'bert'; {KNOWN}"),
        (3, f"unknown model_type '3'; {KNOWN}"),
        (None, f"the model has no model_type; {KNOWN}"),
    ],
)
def test_an_unknown_family_lists_those_that_are_known(model_type: Any, message: str) -> None:
    values = {**SIZES, **({} if model_type is None else {"model_type": model_type})}
    for read in (config_from_dict, config_from_hf):
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            read(values)


def test_an_unknown_key_is_an_error_in_a_recipe_and_kept_in_a_config_json() -> None:
    values = {**GIVEN, "hiden_size": 3}
    with pytest.raises(UserError, match=r"^model\.hiden_size: unknown key \(did you mean 'hidden_size'\?\)$"):
        config_from_dict(values)
    assert config_from_hf(values).to_hf()["hiden_size"] == 3


def test_what_we_cannot_compute_in_a_config_json_is_refused() -> None:
    with pytest.raises(UserError, match=r"^config\.json\.partial_rotary_factor: heads that rotate in part are not "):
        config_from_hf({**GIVEN, "partial_rotary_factor": 0.5})
    with pytest.raises(UserError, match=r"^config\.json\.rope_scaling: a mapping with rope_type and its keys "):
        config_from_hf({**GIVEN, "rope_scaling": "yarn"})


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(UserError) as caught:
        config_from_dict({**GIVEN, "hidden_size": 0, "num_hidden_layers": 0, "typo": 1})
    assert str(caught.value).splitlines() == [
        "model.hidden_size: Input should be greater than 0 (got 0)",
        "model.num_hidden_layers: Input should be greater than 0 (got 0)",
        "model.typo: unknown key",
    ]


def test_a_family_keeps_its_own_default_of_the_heads_size() -> None:
    values = {key: value for key, value in TINY["qwen3"].items() if key != "head_dim"}
    assert config_from_dict({"model_type": "qwen3", **values}).head_dim == 128
    assert config_from_dict({**GIVEN, "hidden_size": "64"}).head_dim == 16


@pytest.mark.parametrize("family", families())
def test_every_family_refuses_a_base_and_an_epsilon_that_are_not_positive(family: str) -> None:
    for key in ("rope_theta", "rms_norm_eps"):
        with pytest.raises(UserError, match=rf"^model\.{key}: Input should be greater than 0 \(got 0.0\)$"):
            config_from_dict({"model_type": family, **TINY.get(family, SIZES), key: 0.0})
