"""Every wrong configuration fails at construction, in words that say what to write instead."""

import pytest

from farspan import FarspanConfig
from farspan.errors import ConfigError
from farspan.mixers import MIXERS


def test_a_pattern_is_repeated_and_a_full_list_sets_the_depth() -> None:
    pattern = FarspanConfig(mixers=["metala", "softmax"], num_hidden_layers=6)
    assert pattern.mixers == ["metala", "softmax"] * 3
    assert FarspanConfig(mixers=["metala", "softmax", "metala"]).num_hidden_layers == 3
    assert FarspanConfig(num_hidden_layers=2).mixers == ["softmax", "softmax"]


def test_json_round_trip(tmp_path) -> None:
    config = FarspanConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        mixers=["metala", "softmax"],
        mixer_options={"softmax": {"sliding_window": 8}, "metala": {"conv_size": None}},
        rope_parameters={"rope_type": "yarn", "factor": 4.0},
    )
    config.save_pretrained(tmp_path)
    again = FarspanConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.layer_types == ["linear_attention", "sliding_attention"]
    assert "layer_types" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    "fields",
    [
        {"norm_place": "sub", "feed_forwards": ["mlp"]},
        {"norm_place": "post", "residual_scaling": "deepnorm", "pooler": True},
        {"causal": False, "mixers": ["cosine"], "num_labels": 3, "problem_type": "regression"},
        {"id2label": {0: "no", 1: "yes"}, "num_labels": 2},
    ],
)
def test_filled_defaults_survive_json(fields: dict, tmp_path) -> None:
    config = FarspanConfig(**fields)
    config.save_pretrained(tmp_path)
    for again in (FarspanConfig.from_pretrained(tmp_path), FarspanConfig.from_dict(config.to_dict())):
        assert again.to_dict() == config.to_dict()
        for name, value in fields.items():
            assert getattr(again, name) == getattr(config, name)
            assert value == getattr(again, name) or name in ("feed_forwards", "mixers")
        assert (again.final_norm, again.classifier_pooling) == (config.final_norm, config.classifier_pooling)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mixers": ["metalla"]}, "did you mean 'metala'"),
        ({"feed_forwards": ["gatedmlp"]}, "did you mean 'gated_mlp'"),
        ({"hiden_size": 64}, "did you mean 'hidden_size'"),
        ({"mixers": ["metala", "softmax"], "num_hidden_layers": 3}, "does not divide num_hidden_layers=3"),
        ({"mixers": "metala"}, r"mixers='metala' is of the wrong type"),
        ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        ({"hidden_size": "64"}, "hidden_size='64' is of the wrong type; accepted: int"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1 must be at least 1"),
        ({"hidden_size": 100, "num_attention_heads": 8}, "not divisible by num_attention_heads=8"),
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, "choose num_key_value_heads from 1, 2, 4, 8"),
        ({"norm_type": "rmsnorm"}, "did you mean 'rms_norm'"),
        ({"hidden_act": "swishh"}, "Unknown hidden_act"),
        ({"hidden_dropout": 1.0}, r"hidden_dropout=1.0 must lie in \[0, 1\)"),
        ({"rope_parameters": {"rope_type": "ntk", "factor": 2}}, "Unknown rope_type 'ntk'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "needs a factor"),
        ({"rope_parameters": {"rope_type": "linear", "factr": 2}}, "did you mean 'factor'"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta=-1 must be a positive number"),
        ({"mixers": ["metala"], "mixer_options": {"metala": {"convsize": 4}}}, "did you mean 'conv_size'"),
        ({"mixers": ["metala"], "mixer_options": {"metala": {"conv_size": 0}}}, "conv_size=0 must be at least 1"),
        (
            {"mixers": ["metala"], "mixer_options": {"softmax": {}}},
            "'softmax', which no layer uses: Accepted: metala.$",
        ),
        ({"problem_type": "ranking"}, "problem_type='ranking' is of the wrong type; accepted: 'regression' or"),
        ({"num_labels": -1}, "num_labels=-1 is no number of classes"),
        ({"num_labels": "3"}, "num_labels='3' is no number of classes"),
        ({"mixer_options": {"softmax": {"sliding_window": 0}}}, "sliding_window=0"),
        ({"mixer_options": {"softmax": {"sliding_window": 2.5}}}, "accepted: int or null"),
        ({"mixer_options": {"softmax": {"attention_bias": "false"}}}, "accepted: bool"),
        ({"mixers": ["metala"], "mixer_options": {"metala": {"key_dim": 0}}}, "key_dim=0 must be positive"),
        ({"mixers": ["metala"], "mixer_options": {"metala": {"scale": float("nan")}}}, "a finite number"),
        ({"norm_eps": float("nan")}, "norm_eps=nan is of the wrong type; accepted: a finite number"),
        ({"eos_token_id": 32000}, "eos_token_id=32000 is no token id"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "option of the mixers"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": -3.0}}, "beta_fast=-3.0"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "attention_factor": "x"}}, "attention_factor='x'"),
    ],
)
def test_wrong_configurations_are_refused(fields: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FarspanConfig(**fields)


def test_head_sizes_are_checked_where_they_matter() -> None:
    from farspan import FarspanForCausalLM

    with pytest.raises(ConfigError, match=r"key_dim=.* not divisible by num_attention_heads"):
        FarspanForCausalLM(FarspanConfig(hidden_size=12, num_attention_heads=4, mixers=["metala"]))
    with pytest.raises(ConfigError, match="RoPE rotates pairs"):
        FarspanForCausalLM(FarspanConfig(hidden_size=12, num_attention_heads=4, mixers=["softmax"]))


def test_a_causal_mixer_is_refused_where_tokens_look_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    FarspanConfig(mixers=["metala"], causal=False)
    monkeypatch.setattr(MIXERS.get("metala")[0], "bidirectional", False)
    with pytest.raises(ConfigError, match="'metala' is causal only"):
        FarspanConfig(mixers=["metala"], causal=False)
