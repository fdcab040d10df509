"""What generates: pipelines of diffusers, loaded from baked weights and called the way a request asks."""
