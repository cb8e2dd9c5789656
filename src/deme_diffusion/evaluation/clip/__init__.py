"""The CLIP score, and a small CLIP of one's own captions to take it by."""
