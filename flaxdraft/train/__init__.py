"""Training: pure state and step, and one loop that has all the side effects."""
