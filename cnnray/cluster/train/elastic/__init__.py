"""A number of workers that changes while they train."""
