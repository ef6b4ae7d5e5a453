"""Weights of the networks: key maps, loading, quantising, LoRA, converting."""
