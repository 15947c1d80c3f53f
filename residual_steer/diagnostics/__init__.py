"""What steering does to a model, measured: each function takes a model and a loader and returns a small result."""
