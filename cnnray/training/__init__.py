"""Training without Ray: losses, optimizers, schedules, the loop and its checkpoints."""
