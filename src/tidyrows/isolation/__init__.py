"""How far the database of a test is kept from that of other tests: one word per level."""
