"""What the tests stand on: databases of every kind, strangers' rows, a zoo of models.

Nothing here imports tidyrows except :mod:`harness.factories`: a test's measure must not be made
of the thing that it measures.
"""
