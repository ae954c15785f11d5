"""COALA."""
