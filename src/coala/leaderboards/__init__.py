"""Published evaluations of a run: judges by name, the replies judged, and one record of each."""
