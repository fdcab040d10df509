"""What workers share: the cache of adapter files on the volume, its records, leases and presets."""
