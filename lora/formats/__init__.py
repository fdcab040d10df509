"""What an adapter file says: its header, tensors, names, algorithms and metadata."""
