"""How good a model is: metrics and calibration from per-sample predictions, and the HTML report."""
