"""Applies adapters to a pipeline's weights, and takes them back bit for bit."""
