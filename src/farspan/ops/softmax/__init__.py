"""Softmax attention: the baseline, with packed documents, padding and sliding windows."""
