"""Frames stream through the worker, and LoRAs change between them: `live.session.run` is one session."""
