"""Models: build by name, load weights, normalise inside the model, save and load bundles."""
