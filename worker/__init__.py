"""Answers jobs: pictures, and actions on LoRAs and presets."""
