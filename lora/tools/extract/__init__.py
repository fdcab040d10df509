"""The tool that extracts a LoRA from two models."""
