"""What dead workers left, found in the ledger and deleted."""
