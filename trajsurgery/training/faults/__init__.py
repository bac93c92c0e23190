"""What can go wrong in a run, found and named.

bad_numbers.py        numbers that are not finite: which part made them, for which prompt
loss_range.py         since when the loss is out of its range
missing_gradients.py  parameters that get no gradient
memory_errors.py      out of memory: what takes less

It may import `distributed` of training.
"""
