"""Games small enough that the answer is known, and what is tried on them."""

import engine.quiet  # noqa: F401  before torch
