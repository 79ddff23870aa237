"""ComfyUI's front end in a real browser, for tests and screenshots."""
