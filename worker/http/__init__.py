"""The worker's own HTTP server: its routes, its line, its errors, its figures."""
