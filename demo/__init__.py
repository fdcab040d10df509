"""The embedded model: an SDXL in miniature that draws simple shapes, and how it was trained."""
