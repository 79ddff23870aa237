"""The engine: maths on tensors, and the one door into ComfyUI (``host``). Knows nothing of nodes."""
