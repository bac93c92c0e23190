"""A run as a whole: it evaluates, trains, evaluates again, and leaves pictures, a report and weights.

trainer.py, callbacks.py, own_parts.py   `Trainer`, its events, objects that stand for a recipe's names
console_output.py, trackers.py           what a run prints, and what it sends to trackers
contact_sheets.py, gradient_terms.py     pictures of fixed prompts and the gradient's terms, now and then
results.py, run_info.py                  what a run leaves: weights, pictures, settings, versions
reports/                                 pictures, tables and pages, made of a run's records
handover/                                weights in the forms that others take

It may import everything but the command line.
"""
