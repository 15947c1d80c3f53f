"""The paper's claims, tested: one script a claim, run as `python -m experiments.NAME`, and a report of what was found."""
