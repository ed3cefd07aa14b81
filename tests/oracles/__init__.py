"""Whole methods, slow and obvious: float64, one tensor at a time, straight from the formulas. Nothing of samkern in here."""
