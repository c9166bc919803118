"""Engine events become changes: which rows a transaction inserted, deleted or moved."""
