"""Find and convert the shipped workflows, and make the images that show them."""
