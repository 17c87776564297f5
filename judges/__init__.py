"""Judges: who says P(y_i beats y_j)."""
