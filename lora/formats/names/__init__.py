"""What the keys of adapter files mean: each layout's names of modules, components and tensors."""
