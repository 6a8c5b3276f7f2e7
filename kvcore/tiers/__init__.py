"""Where cached blocks live beside the device: host memory, disk, Redis."""
