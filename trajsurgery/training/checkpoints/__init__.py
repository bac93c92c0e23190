"""What a run writes so that it can go on: checkpoints, its log and its lock.

training_state.py  what changes in a run, which is what a checkpoint holds
checkpoint.py      which checkpoints are written, kept and read
tensor_folder.py   one folder of tensors, sharded or not, with checksums
output_files.py    files that are whole or not there, the run's lock, errors of the disk
run_log.py         metrics.jsonl

It may import everything of training but the loop and the parts of a step.
"""
