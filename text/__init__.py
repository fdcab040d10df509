"""Text from causal language models: many requests in one batch, each with its own adapters."""
