"""Answers jobs, from the platform's queue and over HTTP: pictures, frames, texts, and actions on LoRAs and presets."""
