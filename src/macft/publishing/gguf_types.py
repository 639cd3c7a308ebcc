"""Types of the weights in a GGUF file, which the command line names before MLX is imported."""

GGUF_TYPES = ("f16", "bf16", "f32", "q8_0")
