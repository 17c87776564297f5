"""How good is a policy, and how good is a judge? `python -m evaluate --help`"""
