"""The layers of a model on worker threads, through numerics/whitening.py into a basis."""
