"""COMAL on language models: the loop and its pairs, oracles of preference, entrants, and matrices of who beats whom."""
