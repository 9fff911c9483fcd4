"""MetaLA: linear attention with a decay per channel, no key of its own, and self-augmentation."""
