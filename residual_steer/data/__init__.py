"""Data that needs no download: what ships with Python and scikit-learn."""
