"""How good is a policy, and how good is a judge? `python -m evaluate --help`"""

import engine.quiet  # noqa: F401  before torch
