"""Image models of the published systems: LongViT, and the slide encoder of Prov-GigaPath.

Source: microsoft/torchscale: examples/longvit; prov-gigapath/prov-gigapath: gigapath/slide_encoder.py and the number of
parameters that demo/run_gigapath.ipynb prints.
"""

import functools
from typing import Any

from farspan.models.configuration import FarspanConfig
from farspan.models.presets.longnet import longnet_block
from farspan.models.presets.preset import Preset

DILATIONS = [1, 2, 4, 8, 16]
LONGVIT_HEADS = GIGAPATH_HEADS = 16
# Segment lengths by the side of the image.
_SEGMENTS = {
    4096: [1024, 2048, 4096, 8192, 16384],
    8192: [1024, 4096, 8192, 16384, 65536],
    16384: [1024, 4096, 16384, 65536, 262144],
    32768: [1024, 4096, 32768, 262144, 1048576],
}


def longvit_segments(image_size: int) -> list[int]:
    """The segment lengths of LongViT for images of this size."""
    return _SEGMENTS.get(image_size, [64, 128, 256, 512, 1024])


def gigapath_segments(slide_size: int = 262144, tile_size: int = 256) -> list[int]:
    """The segment lengths of GigaPath: five, from 1024 by equal ratios to the tiles of the largest slide.

    Example:
        >>> gigapath_segments()
        [1024, 5792, 32768, 185363, 1048576]
    """
    octaves = ((slide_size // tile_size) ** 2).bit_length() - 1
    return [int(2 ** (10 + (octaves - 10) * i / 4)) for i in range(5)]


def longvit_vision(image_size: int, patch_size: int, num_channels: int = 3, *, pooled_norm: bool) -> dict[str, Any]:
    """The fields that make a model read images as LongViT does.

    Args:
        image_size, patch_size, num_channels: as in `VisionOptions`.
        pooled_norm: whether there is the norm before the classifier, which the backbone alone does not have.
    """
    vision = {
        "input": "pixels",
        "image_size": image_size,
        "patch_size": patch_size,
        "num_channels": num_channels,
        "positions": "learned",
        "interpolation_offset": 0.1,
        "class_token": False,
        "pooled_norm": pooled_norm,
        "pooled_norm_eps": 1e-5,
    }
    return {"vision": vision, "classifier_pooling": "mean", "classifier_bias": True, "causal": False}


def gigapath_vision(
    num_channels: int = 1536, *, grid_size: int = 1000, mean: bool = False, eps: float = 1e-6
) -> dict[str, Any]:
    """The fields that make a model read slides as GigaPath does.

    Args:
        num_channels: numbers per tile.
        grid_size: tiles per side of the grid of positions.
        mean: whether the mean of the tiles is classified, or the class token.
        eps: epsilon of the norm behind it.
    """
    vision = {
        "input": "features",
        "num_channels": num_channels,
        "grid_size": grid_size,
        "tile_size": 256,
        "positions": "sincos",
        "class_token": True,
        "pooled_norm": True,
        "pooled_norm_eps": eps,
    }
    pooling = "mean" if mean else "first"
    return {"vision": vision, "classifier_pooling": pooling, "classifier_bias": True, "causal": False}


def _longvit(image_size: int) -> FarspanConfig:
    return FarspanConfig(
        **_shape(384),
        num_attention_heads=LONGVIT_HEADS,
        num_labels=2,
        final_norm=False,
        drop_path_rate=0.1,
        **longnet_block(longvit_segments(image_size), DILATIONS),
        **longvit_vision(image_size, 32, pooled_norm=True),
    )


def _gigapath() -> FarspanConfig:
    return FarspanConfig(
        **_shape(768),
        num_attention_heads=GIGAPATH_HEADS,
        num_labels=0,
        embedding_dropout=0.25,
        hidden_dropout=0.25,
        drop_path_rate=0.1,
        **longnet_block(gigapath_segments(), DILATIONS),
        **gigapath_vision(),
    )


def _shape(width: int) -> dict[str, Any]:
    return {
        "architectures": ["FarspanForImageClassification"],
        "vocab_size": 0,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 12,
        "hidden_act": "gelu",
    }


_LONGVIT = "microsoft/torchscale: examples/longvit, arXiv 2312.03558"

PRESETS = {
    "longvit-small": Preset(functools.partial(_longvit, 1024), 22_914_434, _LONGVIT),
    "longvit-small-4096": Preset(functools.partial(_longvit, 4096), 28_812_674, _LONGVIT),
    "longvit-small-8192": Preset(functools.partial(_longvit, 8192), 47_687_042, _LONGVIT),
    "longvit-small-16384": Preset(functools.partial(_longvit, 16384), 123_184_514, _LONGVIT),
    "longvit-small-32768": Preset(functools.partial(_longvit, 32768), 425_174_402, _LONGVIT),
    "gigapath-slide-encoder": Preset(
        _gigapath, 86_330_880, "prov-gigapath/prov-gigapath: gigapath/slide_encoder.py", published=True
    ),
}
