"""Ways in from other packages' files and models."""
