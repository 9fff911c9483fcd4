"""Sequence mixers, one file per mechanism; `base` holds their contract and registry."""

from farspan.mixers.base import MIXERS, Mixer, MixerShape, register_mixer
from farspan.mixers.cache import KeyValueCache, LayerCache, StateCache
from farspan.mixers.layout import SequenceLayout

__all__ = [
    "MIXERS",
    "KeyValueCache",
    "LayerCache",
    "Mixer",
    "MixerShape",
    "SequenceLayout",
    "StateCache",
    "register_mixer",
]
