"""Farspan: language models whose attention reaches far."""

__version__ = "0.1.0"
