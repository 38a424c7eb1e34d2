"""The classify job."""
