"""Names and meaning of weights: key maps, loading, quantising, LoRA, converting."""
