"""The evaluate job."""
