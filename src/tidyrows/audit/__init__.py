"""The isolation audit: which tests of a suite leave rows, touch others' rows, or need an order."""
