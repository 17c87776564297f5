"""A real language model on a laptop, from start to finish. Read smollm2.py first."""
