"""Checks: options, names and gradients that are refused before a step changes anything."""
