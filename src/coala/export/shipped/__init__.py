"""The files that an exported folder brings along, as they are: nothing of this package is needed to run them."""
