"""Cosine attention (Cottention): similarities of unit vectors, values damped by a learned power of their place."""
