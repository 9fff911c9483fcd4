"""Linear attention with a decay: the operator behind cosine attention, state-space duality and MetaLA."""
