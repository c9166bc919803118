"""The table that names rows in the transaction that makes them, and the liveness of workers."""
