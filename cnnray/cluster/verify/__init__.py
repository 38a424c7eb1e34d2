"""The verify job."""
