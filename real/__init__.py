"""A real language model on a laptop, from start to finish. Read smollm2.py first."""

import engine.quiet  # noqa: F401  before torch
