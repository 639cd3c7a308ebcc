"""Loss, step, optimizer and loop. Knows nothing of ZeroMQ, Hydra or TensorBoard: it sees their interfaces only."""
