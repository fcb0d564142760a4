"""Networks on clips: estimates, scores in child processes, rows and tables."""
