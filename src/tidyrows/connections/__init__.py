"""The connections of one worker: how many it may have, and who has them now."""
