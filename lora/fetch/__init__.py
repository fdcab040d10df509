"""Where an adapter comes from: sources, the hub, Civitai, URLs, and downloads."""
