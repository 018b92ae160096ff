"""Optimizer state of a run, found beside its weights and grown by the plan's own maps.

``find_state`` finds and opens it, ``GrownState`` decides and writes, ``load_into`` gives it to the
optimizer of the next run. torch is imported only where a file of torch is read.
"""
