"""The meaning of the keys of adapter files: the names of modules, components and tensors in each layout."""
