"""One report of what a machine with a GPU does with the pack: right on it, and how fast."""
