"""Answers jobs, from RunPod's queue and over HTTP: pictures, frames, texts, actions on LoRAs."""
