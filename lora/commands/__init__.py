"""The commands of `python -m lora`: one file each, its arguments, its work and its words."""
