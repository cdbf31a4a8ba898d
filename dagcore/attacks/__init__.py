"""The attacks, as users call them."""
