"""The endings of adapter files' names."""

SAFETENSORS = ".safetensors"

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
"""Files of torch.save: read without running anything in them, and kept as .safetensors."""

EXTENSIONS = (SAFETENSORS, *PICKLES)
"""The types of file that are read, in the order of preference."""
