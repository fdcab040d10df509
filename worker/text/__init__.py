"""Answers text jobs: what is asked, the base models, the adapters, the answers."""
