"""From tracked rows to deleted rows: plan, executor, verification, report."""
