"""What every job on Ray is made of."""
