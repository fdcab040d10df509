"""The demo language model: a small world in words, and four adapters whose effects rules can measure."""
