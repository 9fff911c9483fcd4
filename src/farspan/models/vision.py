"""Models that read images, or features of the tiles of an image, and tell its class."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import ModelOutput

from farspan.errors import ConfigError, ShapeError
from farspan.models.configuration import FarspanConfig
from farspan.models.heads import Classifier
from farspan.models.inputs import layout_of, refuse_unknown
from farspan.models.pooling import pool
from farspan.models.vision_options import VisionOptions, vision_options
from farspan.nn.feed_forward import AuxiliaryRecord
from farspan.nn.grid_positions import sincos_2d, stretch_grid
from farspan.nn.norms import make_norm

__all__ = ["FarspanForImageClassification", "FarspanImageClassifierOutput", "VisionOptions"]


@dataclass
class FarspanImageClassifierOutput(ImageClassifierOutput):
    """Loss, logits and hidden states; `aux_loss` is already part of `loss`. `auxiliary` as in the stack's."""

    aux_loss: Tensor | None = None
    auxiliary: tuple[AuxiliaryRecord | None, ...] | None = None


class VisionEmbeddings(nn.Module):
    """What all inputs have: a map to the model's width, perhaps a class token, perhaps learned positions."""

    def __init__(self, config: FarspanConfig, options: VisionOptions, projection: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        self.options = options
        self.initializer_range = config.initializer_range
        self.token_last = config.causal
        self.projection: nn.Conv2d | nn.Linear = projection
        rows, columns = options.grid
        learned = torch.empty(rows * columns, config.hidden_size) if options.positions == "learned" else None
        self.positions = None if learned is None else nn.Parameter(learned)
        self.class_token = nn.Parameter(torch.empty(config.hidden_size)) if options.class_token else None

    def reset_parameters(self) -> None:
        for table in (self.positions, self.class_token):
            if table is not None:
                nn.init.normal_(table, std=self.initializer_range)

    def with_class_token(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`[B, N, D]` and `[B, N]` with the class token, if there is one, where it sees all others."""
        if self.class_token is None:
            return x, mask
        x = self._beside(x, self.class_token.expand(len(x), 1, -1))
        return x, None if mask is None else self._beside(mask, mask.new_ones(len(x), 1))

    def without_class_token(self, x: Tensor) -> Tensor:
        """The inverse for `[B, N + 1, D]`."""
        if self.class_token is None:
            return x
        return x[:, :-1] if self.token_last else x[:, 1:]

    def _beside(self, x: Tensor, token: Tensor) -> Tensor:
        return torch.cat((x, token) if self.token_last else (token, x), dim=1)


class PatchEmbeddings(VisionEmbeddings):
    """x_p = W · pixels of patch p + b + position of p, patches counted row after row."""

    def __init__(self, config: FarspanConfig, options: VisionOptions) -> None:
        size, width = options.patch_size, config.hidden_size
        super().__init__(config, options, nn.Conv2d(options.num_channels, width, kernel_size=size, stride=size))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[B, C, height, width]` → `[B, N, D]`."""
        size, channels = self.options.patch_size, self.options.num_channels
        shape = pixel_values.shape
        if len(shape) != 4 or shape[1] != channels or not all(n and n % size == 0 for n in shape[2:]):
            raise ShapeError(
                f"pixel_values has shape {list(shape)}; expected [B, {channels}, height, width] with sides that "
                f"patch_size={size} divides."
            )
        x = self.projection(pixel_values.to(self.projection.weight.dtype)).flatten(2).mT
        table = self._table(x.device)
        if table is None:
            return x
        target = (shape[2] // size, shape[3] // size)
        return x + stretch_grid(table, self.options.grid, target, self.options.interpolation_offset).to(x.dtype)

    def _table(self, device: torch.device) -> Tensor | None:
        if self.options.positions != "sincos":
            return self.positions
        rows, columns = self.options.grid
        places = torch.arange(rows * columns, device=device)
        return sincos_2d(places // columns, places % columns, self.projection.weight.shape[0], max(rows, columns))


class TileEmbeddings(VisionEmbeddings):
    """x_t = W f_t + b + sines and cosines of the place of tile t in a square grid."""

    def __init__(self, config: FarspanConfig, options: VisionOptions) -> None:
        super().__init__(config, options, nn.Linear(options.num_channels, config.hidden_size))

    def forward(self, features: Tensor, coordinates: Tensor | None, mask: Tensor | None) -> Tensor:
        """Features `[B, N, F]`, coordinates `[B, N, 2]` (x, y in pixels) and padding mask `[B, N]` → `[B, N, D]`."""
        shape, width = features.shape, self.options.num_channels
        if len(shape) != 3 or shape[-1] != width:
            raise ShapeError(f"features has shape {list(shape)}; expected [B, N, num_channels={width}].")
        if mask is not None and mask.shape != shape[:2]:
            raise ShapeError(f"attention_mask has shape {list(mask.shape)}; expected [B={shape[0]}, N={shape[1]}].")
        x = self.projection(features.to(self.projection.weight.dtype))
        if self.options.positions == "none":
            return x
        if coordinates is None or coordinates.shape != (*shape[:2], 2):
            given = "none" if coordinates is None else list(coordinates.shape)
            raise ShapeError(f"coordinates: expected [B={shape[0]}, N={shape[1]}, 2], got {given}.")
        tiles = coordinates.div(self.options.tile_size, rounding_mode="floor").long()
        if mask is not None:
            tiles = tiles.masked_fill((mask == 0).unsqueeze(-1), 0)
        size = self.options.grid_size
        if not torch.compiler.is_compiling() and tiles.numel() and not bool(((tiles >= 0) & (tiles < size)).all()):
            raise ShapeError(
                f"coordinates reach tile {int(tiles.amax())} and tile {int(tiles.amin())}; the grid holds 0 to "
                f"{size - 1} (grid_size) tiles of {self.options.tile_size} pixels (tile_size) per side."
            )
        return x + sincos_2d(tiles[..., 0], tiles[..., 1], x.shape[-1], size).to(x.dtype)


class FarspanForImageClassification(Classifier):
    """The class of an image, several labels of it, or numbers, over any mixer.

    The tokens are the patches of the image, or vectors of its tiles (`config.vision`, see `VisionOptions`), and perhaps
    a class token. `config.classifier_pooling` says which state is classified: of the `first` or the `last` token (the
    class token, if there is one) or the `mean` of the patches. With `num_labels=0` the logits are that state itself.

    Example:
        >>> config = FarspanConfig(
        ...     vision={"image_size": 32, "patch_size": 8}, vocab_size=0, causal=False, hidden_size=32,
        ...     num_attention_heads=2, mixers=["cosine", "dilated"], num_labels=3,
        ... )
        >>> model = FarspanForImageClassification(config)
        >>> model(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 2])).logits.shape
        torch.Size([2, 3])
    """

    output_class = FarspanImageClassifierOutput
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: FarspanConfig) -> None:
        if config.vision is None:
            raise ConfigError("FarspanForImageClassification needs the field vision, such as {'image_size': 224}.")
        super().__init__(config)
        width, options = config.hidden_size, vision_options(config.vision)
        pixels = options.input == "pixels"
        self.main_input_name = "pixel_values" if pixels else "features"
        self.embeddings = PatchEmbeddings(config, options) if pixels else TileEmbeddings(config, options)
        self.pooled_norm: nn.Module = nn.Identity()
        if options.pooled_norm:
            self.pooled_norm = make_norm(config.norm_type, width, options.pooled_norm_eps)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        coordinates: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        **more: Any,
    ) -> ModelOutput | tuple:
        """Logits and, with labels, the mean loss.

        Args:
            pixel_values: `[B, C, height, width]`, of models that read pixels; sides are multiples of the patch size.
            features: `[B, N, F]`, one vector per tile, of models that read features.
            coordinates: `[B, N, 2]`, x and y of the tiles in pixels; unused without positions.
            attention_mask: `[B, N]`, 1 for real tiles, of models that read features; padding may stand anywhere.
            labels: see `farspan.nn.losses.classification_loss`.
            output_hidden_states: whether to return the input of each layer and the final state.
            output_attentions: as in `FarspanForCausalLM`.
            num_items_in_batch: divisor of the loss instead of the number of scored labels (gradient accumulation).
            return_dict: False returns a tuple.
            more: what collators add for other models is ignored, any other name refused.

        Returns:
            `FarspanImageClassifierOutput`; logits `[B, num_labels]`, or `[B, D]` with `num_labels=0`.

        Raises:
            ShapeError: for inputs that do not fit the model or each other.
            ConfigError: for inputs of the other kind, and for attention weights that do not exist.
        """
        refuse_unknown(self.forward, more)
        x = self._tokens(pixel_values, features, coordinates, attention_mask)
        x, mask = self.embeddings.with_class_token(x, attention_mask)
        outputs = self.model(
            inputs_embeds=x,
            attention_mask=mask,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        states, how = outputs.last_hidden_state, str(self.config.classifier_pooling)
        if how == "mean":
            states, mask = self.embeddings.without_class_token(states), attention_mask
        layout = layout_of((states.shape[0], states.shape[1]), x.device, mask, None, None, None, None)
        pooled = pool(states, layout, how)
        return self.classify(outputs, self.pooled_norm(pooled), labels, num_items_in_batch, return_dict)

    def _tokens(
        self,
        pixel_values: Tensor | None,
        features: Tensor | None,
        coordinates: Tensor | None,
        attention_mask: Tensor | None,
    ) -> Tensor:
        """`[B, N, D]`."""
        if isinstance(self.embeddings, PatchEmbeddings):
            if pixel_values is None or features is not None or coordinates is not None or attention_mask is not None:
                raise ConfigError("This model reads pixels: give pixel_values [B, C, height, width] and nothing else.")
            return self.embeddings(pixel_values)
        if features is None or pixel_values is not None:
            raise ConfigError("This model reads features of tiles: give features [B, N, F] and coordinates [B, N, 2].")
        return self.embeddings(features, coordinates, attention_mask)
