"""Token dispatch, transfers, traffic meter."""
