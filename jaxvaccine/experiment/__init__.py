"""The whole experiment, align, attack, evaluate, as functions over frozen configs; runs, lanes, plans and their
results."""
