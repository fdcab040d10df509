"""Low-rank factors: decompositions, choice of ranks, cutting and joining."""
