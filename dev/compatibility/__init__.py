"""What the pack does with every model and node of ComfyUI, what it uses of ComfyUI, and whether a long-running server grows."""
