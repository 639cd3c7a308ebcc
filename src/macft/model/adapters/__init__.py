"""LoRA and DoRA adapters, or chosen layers of a model: which layers, their dropout, their files, fused or converted."""
