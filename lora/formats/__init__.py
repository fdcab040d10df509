"""Reads adapter files: their header, tensors, names, algorithms and metadata."""
