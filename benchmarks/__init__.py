"""Measurements, each a command that writes its result under `benchmarks/results/`."""
