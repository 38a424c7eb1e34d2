"""How images become labels on Ray, for every job that asks a model."""
