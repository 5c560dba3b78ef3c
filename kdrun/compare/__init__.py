"""Fair comparisons of losses: plan, ledger, trials, statistics, report."""
