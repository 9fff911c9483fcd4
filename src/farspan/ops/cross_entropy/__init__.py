"""Cross entropy of rows of logits, and its gradient in their place."""
