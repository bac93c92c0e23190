"""Evaluation: images of held-out prompts, their scores, and statistics.

held_out.py, validation_rounds.py        scores before and after training, and while it runs
paired_statistics.py, calibration.py, diversity.py    gains with standard errors; score against rules; diversity
picture_scores.py, picture_files.py      `trajsurgery score`; reading pictures
model_comparison.py, model_variants.py, geneval_folders.py, comparison_table.py    `trajsurgery evaluate`
options.py                               options of both commands

It may import everything up to `training`.
"""
