"""The training command: options, data, training loop, checkpoints and reports."""
