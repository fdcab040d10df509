"""Checkpoints and model folders: read tensor by tensor, written as a stream."""
