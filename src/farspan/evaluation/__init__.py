"""Measuring and using a trained model.

==================  ====================================================================================
``perplexity``      bits per byte, defined once: ``bits_per_byte(model, documents, ...)``
``context_length``  perplexity by context length: sliding window, position, suffix, carried state
``evaluate``        all of it on a model directory, with its results as JSON, tables and plots
``baselines``       an n-gram model of bytes and a general compressor on the same text
``generation``      sampling text, piece by piece
``samples``         the share of sampled lines that read as Python
``loading``         a model directory from disk
==================  ====================================================================================
"""
