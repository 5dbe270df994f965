"""What a person looks at: statistics, Markdown tables and figures of runs and of plans, in one style."""
