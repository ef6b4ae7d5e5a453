"""Weight files: reading, key maps, loading, quantising, LoRA and the hub."""
