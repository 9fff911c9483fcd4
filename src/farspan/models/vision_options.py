"""What a model reads instead of tokens: images, or features of the tiles of an image too large to be one."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from farspan.errors import ConfigError
from farspan.nn.options import build

if TYPE_CHECKING:
    from farspan.models.configuration import FarspanConfig


@dataclass
class VisionOptions:
    """Fields of `FarspanConfig.vision`.

    Attributes:
        input: `pixels`: an image is cut into square patches, and a linear map of each is a token; `features`: tiles
            come as vectors with their coordinates, and a linear map of each vector is a token.
        image_size: height and width that the positions are trained for (one number for squares), of `pixels`; images of
            other sizes are read with interpolated positions.
        patch_size: height and width of a patch, of `pixels`.
        num_channels: channels of an image, or numbers per tile.
        grid_size: tiles per side of the largest image, of `features`.
        tile_size: pixels per side of a tile, of `features`: coordinates are divided by it and rounded down.
        positions: `learned` (one vector per patch), `sincos` (fixed, two-dimensional) or `none`; `features` come in any
            number and have no `learned` ones.
        interpolation_offset: added to rows and columns of other sizes where positions are interpolated; see
            `farspan.nn.grid_positions.stretch_grid`.
        class_token: whether there is a learned token besides the patches. It stands where it sees them all: first in a
            model that looks both ways, last in a causal one.
        pooled_norm: whether a norm follows the pooling, before the classifier.
        pooled_norm_eps: its epsilon.
    """

    input: Literal["pixels", "features"] = "pixels"
    image_size: int | list[int] = 224
    patch_size: int = 16
    num_channels: int = 3
    grid_size: int = 1000
    tile_size: int = 256
    positions: Literal["learned", "sincos", "none"] = "learned"
    interpolation_offset: float = 0.0
    class_token: bool = False
    pooled_norm: bool = False
    pooled_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("patch_size", "num_channels", "grid_size", "tile_size", "pooled_norm_eps"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"vision.{name}={getattr(self, name)} must be positive.")
        if not 0 <= self.interpolation_offset < 1:
            raise ConfigError(f"vision.interpolation_offset={self.interpolation_offset} must lie in [0, 1).")
        sides = self.image_size if isinstance(self.image_size, list) else [self.image_size]
        if len(sides) > 2 or not sides or any(side < 1 or side % self.patch_size for side in sides):
            raise ConfigError(
                f"vision.image_size={self.image_size} must be one number, or height and width, divisible by "
                f"patch_size={self.patch_size}."
            )
        if self.input == "features" and self.positions == "learned":
            raise ConfigError("vision.positions='learned' needs input='pixels'; 'features' take 'sincos' or 'none'.")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at the trained size."""
        sides = self.image_size if isinstance(self.image_size, list) else [self.image_size]
        return sides[0] // self.patch_size, sides[-1] // self.patch_size


def vision_options(values: dict[str, Any]) -> VisionOptions:
    """The options that a configuration's `vision` holds.

    Raises:
        ConfigError: for unknown fields and values that are not accepted.
    """
    options: VisionOptions = build(VisionOptions, values, "vision")
    return options


def check_vision(config: "FarspanConfig") -> None:
    """Refuses a configuration whose other fields make no sense for a model that reads images.

    Raises:
        ConfigError: naming the field.
    """
    assert config.vision is not None
    options = vision_options(config.vision)
    for name, accepted in (
        ("vocab_size", 0),
        ("type_vocab_size", 0),
        ("position_embedding", "none"),
        ("pooler", False),
    ):
        if getattr(config, name) != accepted:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} is for models of text; with vision, set {name}={accepted!r}."
            )
    if options.positions == "sincos" and config.hidden_size % 4:
        raise ConfigError(
            f"vision.positions='sincos' needs hidden_size divisible by 4, got {config.hidden_size}; choose "
            f"{-(-config.hidden_size // 4) * 4}, or other positions."
        )
