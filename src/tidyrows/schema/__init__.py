"""The foreign keys of a schema: facts in, order and cycles out."""
