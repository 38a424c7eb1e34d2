"""Model selection: a space of settings, points in it, and what trials at these points gave."""
