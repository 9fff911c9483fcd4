"""Collinear constrained attention: softmax attention whose keys are the query itself, scaled per rotary pair."""
