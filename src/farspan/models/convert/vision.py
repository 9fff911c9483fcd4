"""LongViT and the slide encoder of Prov-GigaPath.

Source: microsoft/torchscale: examples/longvit/longvit.py, modeling_finetune.py; prov-gigapath/prov-gigapath:
gigapath/slide_encoder.py, gigapath/torchscale/model/LongNetConfig.py.
"""

from typing import Any

from farspan.errors import CheckpointError
from farspan.models.configuration import FarspanConfig
from farspan.models.convert.families import Family, Published
from farspan.models.convert.longnet import layers_entries, read_block, write_block
from farspan.models.convert.names import AnyEntry, Entry, affine
from farspan.models.convert.settings import published_fields, refuse_other, shared_fields
from farspan.models.presets.vision import (
    DILATIONS,
    GIGAPATH_HEADS,
    LONGVIT_HEADS,
    gigapath_segments,
    gigapath_vision,
    longvit_segments,
    longvit_vision,
)
from farspan.models.vision_options import vision_options

_LAYER = "encoder.layers.0.self_attn.q_proj.weight"
_PATCHES = "patch_embed.proj.weight"


def longvit_entries(config: FarspanConfig) -> list[AnyEntry]:
    """A LongViT: the backbone alone, or with the norm and the classifier of its fine-tuning."""
    assert config.vision is not None
    rows, columns = vision_options(config.vision).grid
    shape = (rows * columns, config.hidden_size)
    prefix = "model." if _fine_tuned(config) else ""
    entries: list[AnyEntry] = [
        *_encoder_entries(config),
        Entry("pos_embed", "embeddings.positions", (1, *shape), shape),
    ]
    entries = [entry.under(prefix, "") for entry in entries]
    if _fine_tuned(config):
        entries += affine("fc_norm", "pooled_norm")
    return [*entries, *(affine("head", "classifier") if config.num_labels else [])]


def gigapath_entries(config: FarspanConfig) -> list[AnyEntry]:
    """The slide encoder; its fixed positions are not stored."""
    width = config.hidden_size
    return [
        *_encoder_entries(config),
        Entry("cls_token", "embeddings.class_token", (1, 1, width), (width,)),
        *affine("norm", "pooled_norm"),
    ]


def _encoder_entries(config: FarspanConfig) -> list[AnyEntry]:
    layers: list[AnyEntry] = [entry.under("encoder.", "model.") for entry in layers_entries(config)]
    if config.final_norm:
        layers += affine("encoder.layer_norm", "model.norm")
    return [*affine("patch_embed.proj", "embeddings.projection"), *layers]


def _fine_tuned(config: FarspanConfig) -> bool:
    return config.vision is not None and config.vision["pooled_norm"]


def read_longvit_config(published: Published) -> FarspanConfig:
    """LongViT's configuration: the arguments of its class as a `config.json`."""
    config, shapes = published.config, published.shapes
    prefix = "model." if f"model.{_PATCHES}" in shapes else ""
    width, channels, patch, _ = shapes[prefix + _PATCHES]
    side = round(shapes[f"{prefix}pos_embed"][1] ** 0.5)
    size = config.get("img_size", side * patch)
    fields = shared_fields(config)
    if fields.get("id2label") is None:
        fields["num_labels"] = shapes.get("head.weight", (0,))[0]
    settings = {"segment_length": longvit_segments(size), "dilated_ratio": DILATIONS, **config}
    block = read_block(settings, before=True) | {"embedding_dropout": config.get("drop_rate", 0.0)}
    return FarspanConfig(
        architectures=["FarspanForImageClassification"],
        vocab_size=0,
        hidden_size=width,
        intermediate_size=shapes[f"{prefix}encoder.layers.0.ffn.fc1.weight"][0],
        num_hidden_layers=published.layers(f"{prefix}encoder.layers."),
        num_attention_heads=config.get("num_heads", LONGVIT_HEADS),
        **block,
        final_norm=f"{prefix}encoder.layer_norm.weight" in shapes,
        **longvit_vision(size, patch, channels, pooled_norm="fc_norm.weight" in shapes),
        **fields,
    )


def write_longvit_config(config: FarspanConfig) -> dict[str, Any]:
    """The inverse of `read_longvit_config`."""
    vision = config.vision or {}
    return {
        "model_type": "longvit",
        "img_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "num_heads": config.num_attention_heads,
        "num_classes": config.num_labels,
        "drop_rate": config.embedding_dropout,
        **_write_encoder(config),
    }


def read_gigapath_config(published: Published) -> FarspanConfig:
    """GigaPath's configuration: the arguments of `LongNetViT` as a `config.json`, with those of its encoder."""
    config, shapes = published.config, published.shapes
    if any(name.startswith("slide_encoder.") for name in shapes):
        raise CheckpointError(
            "This is a classifier on top of GigaPath's slide encoder, which reads the states of layers in the middle; "
            "Farspan has no such head. Convert the slide encoder: the parameters under slide_encoder., without it."
        )
    width, channels = shapes[_PATCHES]
    slide, tile = config.get("max_wsi_size", 262144), config.get("tile_size", 256)
    settings = {
        "segment_length": gigapath_segments(slide, tile),
        "dilated_ratio": DILATIONS,
        "dropout": 0.25,
        "drop_path_rate": 0.1,
        **config,
    }
    refuse_other(settings, {"deepnorm": (False,)})
    return FarspanConfig(
        architectures=["FarspanForImageClassification"],
        vocab_size=0,
        hidden_size=width,
        intermediate_size=shapes["encoder.layers.0.ffn.fc1.weight"][0],
        num_hidden_layers=published.layers("encoder.layers."),
        num_attention_heads=config.get("encoder_attention_heads", GIGAPATH_HEADS),
        **read_block(settings, before=True),
        final_norm="encoder.layer_norm.weight" in shapes,
        **gigapath_vision(
            channels,
            grid_size=config.get("slide_ngrids", 1000),
            mean=config.get("global_pool", False),
            eps=config.get("norm_eps", 1e-6),
        ),
        **{"num_labels": 0, **shared_fields(config)},
    )


def write_gigapath_config(config: FarspanConfig) -> dict[str, Any]:
    """The inverse of `read_gigapath_config`."""
    vision = config.vision or {}
    return {
        "model_type": "gigapath",
        "encoder_attention_heads": config.num_attention_heads,
        "slide_ngrids": vision["grid_size"],
        "global_pool": config.classifier_pooling == "mean",
        "norm_eps": vision["pooled_norm_eps"],
        **_write_encoder(config),
    }


def _write_encoder(config: FarspanConfig) -> dict[str, Any]:
    """What both classes of models are built from."""
    assert config.vision is not None and config.intermediate_size is not None
    return {
        "in_chans": config.vision["num_channels"],
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "normalize_output": config.final_norm,
        **write_block(config),
        **published_fields(config),
    }


def _matches(published: Published, prefix: str, axes: int) -> bool:
    """Patches of pixels have a kernel of four axes, tiles a matrix."""
    shapes = published.shapes
    return any(before + _LAYER in shapes and len(shapes.get(before + _PATCHES, ())) == axes for before in ("", prefix))


FAMILIES: tuple[Family, ...] = (
    Family(
        "longvit",
        "LongViT (torchscale)",
        lambda published: _matches(published, "model.", 4),
        read_longvit_config,
        write_longvit_config,
        longvit_entries,
    ),
    Family(
        "gigapath",
        "Slide encoder of Prov-GigaPath",
        lambda published: _matches(published, "slide_encoder.", 2),
        read_gigapath_config,
        write_gigapath_config,
        gigapath_entries,
        ignored=("pos_embed",),
    ),
)
