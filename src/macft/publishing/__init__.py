"""Puts adapters and fused models on the Hugging Face Hub, with a model card."""
