"""The shipped workflows: find and convert them, and make the images that show them."""
