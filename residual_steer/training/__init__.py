"""One training loop for every architecture and every method."""
