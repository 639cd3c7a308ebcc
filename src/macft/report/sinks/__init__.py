"""What shows or keeps the events of a run: console, TensorBoard, files, log, and a program's own functions."""
