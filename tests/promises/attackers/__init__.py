"""Attackers of the promises in docs/reliability.md: at random, from a seed that a failure shows.

Here each does a few rounds. `make attack` gives each up to ATTACK_SECONDS and a new ATTACK_SEED, and writes
what was done to benchmarks/results/attack.json.
"""
