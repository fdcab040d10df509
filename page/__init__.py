"""The web page: what a worker can do, from a browser on this machine."""
