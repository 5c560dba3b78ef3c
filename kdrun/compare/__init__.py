"""Comparisons of losses: plan, ledger, trials, statistics and report."""
