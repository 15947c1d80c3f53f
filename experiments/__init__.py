"""The paper's claims, tested: one script a claim (`python -m experiments.NAME`), and a report of what was found."""
