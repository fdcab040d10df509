"""Serves RunPod's queue: when a job is taken, what is sent meanwhile, how the worker ends."""
