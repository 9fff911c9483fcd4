"""What a forward pass is given, checked and brought into one form: positions, padding, packed documents."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from farspan.errors import ConfigError, ShapeError, nearest
from farspan.mixers.layout import SequenceLayout
from farspan.models.cache import FarspanCache, check_context_length, positions_of
from farspan.ops import varlen

# What tokenizers, collators and versions of transformers pass along for other models; it has no meaning here.
_IGNORED_ARGUMENTS = frozenset(
    (
        "assistant_tokenizer",
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "max_length_k",
        "max_length_q",
        "seq_idx",
        "special_tokens_mask",
        "tokenizer",
    )
)


def refuse_unknown(forward: Callable[..., Any], more: Mapping[str, Any], also: tuple[str, ...] = ()) -> None:
    """Refuses arguments that `forward` does not have, except those that are passed to every model and mean nothing.

    Args:
        forward: the method whose signature says what is accepted.
        more: what it received beside.
        also: accepted names that are not in the signature.

    Raises:
        ConfigError: naming the nearest accepted name.
    """
    for name in more:
        if name not in _IGNORED_ARGUMENTS:
            accepted = [*inspect.signature(forward).parameters, *also]
            raise ConfigError(f"forward() has no argument {name!r}: {nearest(name, accepted)}")


def check_cache(cache: FarspanCache | None, mixers: Sequence[str], rows: int, causal: bool) -> None:
    """Refuses a cache that does not belong to this model and batch; one that does may be written to from here on.

    Raises:
        ConfigError: for another class, a cache that is used up, torn or of other mixers, and where the model looks both
            ways.
        ShapeError: for another depth or number of rows.
    """
    if cache is None:
        return
    if not isinstance(cache, FarspanCache):
        raise ConfigError(f"past_key_values is a {type(cache).__name__}; Farspan needs model.new_cache().")
    if cache.used_up:
        raise ConfigError("past_key_values was used up by `decode`; give model.new_cache().")
    if cache.interrupted:
        raise ConfigError(
            "past_key_values is torn: a forward pass that wrote to it failed half-way, so that its layers have read "
            "different tokens; read the text again with model.new_cache()."
        )
    if not causal:
        raise ConfigError("past_key_values needs causal=true: a model that looks both ways has no past to keep.")
    if len(cache.layers) != len(mixers):
        raise ShapeError(f"past_key_values has {len(cache.layers)} layers, the model {len(mixers)}.")
    if cache.mixers and cache.mixers != list(mixers):
        theirs, ours = (", ".join(dict.fromkeys(names)) for names in (cache.mixers, mixers))
        raise ConfigError(f"past_key_values is of another model (of {theirs}; this one is of {ours}); use new_cache().")
    if cache.batch_size not in (-1, rows):
        raise ShapeError(f"past_key_values holds {cache.batch_size} rows, the input has {rows}.")
    cache.leave_inference_mode()


def layout_of(
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    cache: FarspanCache | None,
    context_length: int | None,
    compact: bool = False,
) -> SequenceLayout:
    """Where the tokens of one forward pass stand; fixes the cache's context length at its first use.

    Args:
        shape: rows and new tokens per row, (B, T).
        device: where the positions are wanted.
        attention_mask, position_ids, cu_seqlens, cache, context_length: as in `FarspanForCausalLM.forward`.
        compact: whether no token sees a later one, nor a cache what stands behind the last: padding may then be left in
            by a compiled graph.

    Raises:
        ShapeError: for inputs that do not fit each other.
        ConfigError: for a context without a token.
    """
    rows, length = shape
    check_context_length(context_length)
    seen = 0 if cache is None else cache.tokens_seen
    mask = _padding_mask(attention_mask, rows, length, seen)
    if position_ids is None:
        positions = positions_of(mask, (rows, length), cache, device)
    else:
        accepted = ((length,), (1, length), (rows, length))
        if tuple(position_ids.shape) not in accepted or position_ids.is_floating_point():
            raise ShapeError(
                f"position_ids is {position_ids.dtype} of shape {list(position_ids.shape)}; expected integers "
                f"[B={rows}, T={length}]."
            )
        positions = position_ids.to(device).reshape(-1, length).expand(rows, -1)
    if cu_seqlens is None and position_ids is not None and mask is None and rows == 1 and seen == 0 and length > 1:
        cu_seqlens = _documents(positions)
    if cu_seqlens is not None:
        if mask is not None or seen:
            raise ShapeError("cu_seqlens describes packed documents; it excludes attention_mask and a filled cache.")
        if rows != 1:
            raise ShapeError(f"cu_seqlens needs batch 1, the input has {rows} rows; lay them end to end in one row.")
        varlen.check_cu_seqlens(cu_seqlens, length)
        if position_ids is None:
            positions = varlen.position_ids(cu_seqlens, length).reshape(1, -1)
    if cache is not None:
        cache.context_length = cache.context_length or context_length or seen + length
        context_length = cache.context_length
    compact = compact and seen == 0 and torch.compiler.is_compiling()
    return SequenceLayout(positions, mask, cu_seqlens, context_length, compact)


def check_table(layout: SequenceLayout, reach: int | None, rows: int) -> None:
    """Refuses positions beyond a table of learned positions.

    Args:
        layout: of this forward pass.
        reach: a number that all positions lie below, if one is known without asking the device; else None.
        rows: positions that the table has.

    Raises:
        ShapeError: naming the largest position.
    """
    if (reach is not None and reach <= rows) or torch.compiler.is_compiling():
        return
    if layout.positions.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # no value can be asked for; `decode` replays no step beyond the table
    largest = int(layout.positions.max())
    if largest >= rows:
        raise ShapeError(
            f"Position {largest} is beyond the {rows} learned positions (max_position_embeddings); shorten the input, "
            "or use a model with position_embedding='none'."
        )


def _padding_mask(attention_mask: Tensor | None, rows: int, length: int, seen: int) -> Tensor | None:
    """The new tokens' part of a mask as bool, or None when all are real."""
    if attention_mask is None:
        return None
    if (
        attention_mask.dim() != 2
        or attention_mask.shape[0] != rows
        or attention_mask.shape[1] not in (length, seen + length)
    ):
        raise ShapeError(
            f"attention_mask has shape {list(attention_mask.shape)}; expected [B={rows}, T={length}]"
            + (f" or [B={rows}, past + T={seen + length}]." if seen else ".")
        )
    mask = attention_mask[:, -length:].bool() if length else attention_mask[:, :0].bool()
    unusual = attention_mask.is_floating_point() and not torch.compiler.is_compiling()
    if unusual and not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ShapeError("attention_mask holds other values than 0 and 1; give 1 for real tokens, 0 for padding.")
    # Without padding the fast paths apply; under torch.compile the question would break the graph.
    return None if not torch.compiler.is_compiling() and bool(mask.all()) else mask


@torch.compiler.disable
def _documents(positions: Tensor) -> Tensor | None:
    """Boundaries where the positions of a single row restart, or None when they never do."""
    return None if bool((positions[0, 1:] > positions[0, :-1]).all()) else varlen.from_position_ids(positions)


def next_positions(layout: SequenceLayout, cache: FarspanCache) -> Tensor:
    """Each row's position after its newest real token."""
    positions = layout.positions
    if layout.padding_mask is not None:
        positions = positions.masked_fill(~layout.padding_mask, -1)
    following = positions.amax(-1) + 1 if positions.shape[1] else positions.new_zeros(len(positions))
    return following if cache.next_positions is None else torch.maximum(following, cache.next_positions)
