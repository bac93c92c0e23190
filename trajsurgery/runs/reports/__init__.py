"""Pictures and tables made of a run's records.

run_report.py           reward curve, samples before and after, closing table
validation_report.py    validation rounds and the anchor
filmstrip.py            the images of a noise search

It may import everything up to `dry_run`.
"""
