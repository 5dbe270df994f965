"""The experiment: align, attack, evaluate, and plans of many such runs."""
