"""LoRA for diffusion pipelines: find, fetch, read, apply, and leave no trace.

The library knows no job, no prompt and no RunPod. Reading order: `errors`, `sources`, `cache`,
`header`, `keys`, `algorithms`, `files`, `engine`, `library`.
"""
