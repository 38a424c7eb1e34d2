"""Collections of images: sources, splits, packing, the manifest and the order of training."""
