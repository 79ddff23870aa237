"""The engine: maths on tensors, and the one door into the host (``host``). Knows nothing of nodes."""
