"""Everything that is written for a CUDA device: the stages, what a gather does there, and its clock.

Nothing here is imported where there is no such device: most modules import Triton, and a CPU build has none.
"""
