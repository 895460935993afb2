"""Plain PyTorch implementations: the definition of correct, and the CPU path."""
