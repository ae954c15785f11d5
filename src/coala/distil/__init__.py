"""Guidance distilled into a change of the output layer: replies of a teacher, their states, one convex program.

head --guides--> replies of the model itself --one convex program--> a (d, d) change of the output layer
"""

from coala.distil.matrix import output_matrix
from coala.distil.stage import distil
from coala.distil.states import Lesson, teacher_states

__all__ = ["Lesson", "distil", "output_matrix", "teacher_states"]
