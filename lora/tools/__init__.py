"""The tools for adapter files and checkpoints, as functions."""
