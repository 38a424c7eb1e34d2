"""Bytes to pixels: decode with limits, fit to the model's size in uint8, augment."""
