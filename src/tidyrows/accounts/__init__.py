"""Accounts outside of the database: made for a worker, logged in once, gone with its rows."""
