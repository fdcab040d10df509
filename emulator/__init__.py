"""RunPod serverless on one machine: both sides of its API over real worker processes. A test bench.

`python -m emulator --workers 2 -- python handler.py`; see docs/development.md. What it answers follows the
public API (https://docs.runpod.io/serverless/endpoints/operation-reference) and the runpod SDK's own wire.
"""
