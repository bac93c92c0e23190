"""A run as a whole: it evaluates, trains, evaluates again, and leaves pictures, a report and weights.

reports/  pictures and tables, made of a run's records

It may import everything but the command line.
"""
