"""The training command on several ranks (processes)."""
