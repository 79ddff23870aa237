"""The embedded model: procedural captioned scenes, a tiny text-to-image model trained on them, and its evaluation."""
