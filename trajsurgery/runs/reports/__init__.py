"""Pictures and tables made of a run's records.

run_report.py           reward curve, samples before and after, closing table
validation_report.py    validation rounds and the anchor
filmstrip.py            the images of a noise search
saved_pictures.py       held-out pairs and contact sheets as files
run_folder.py           what a run left, read again
charts.py               plotly figures of it
html_report.py, comparison_page.py          report.html, comparison.html
html_page.py, embedded_pictures.py, page/   one file that loads nothing: template, style, script, pictures

It may import everything up to `dry_run`.
"""
