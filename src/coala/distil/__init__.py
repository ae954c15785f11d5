"""Guidance distilled into a change of the output layer: replies of a teacher, their states, one convex program.

head --guides--> replies of the model itself --one convex program--> a (d, d) change of the output layer
"""
