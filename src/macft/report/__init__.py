"""What a run tells: console, TensorBoard, metrics file, summary."""
