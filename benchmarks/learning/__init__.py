"""What `time_to_accuracy.py` is made of: tasks, contenders, one training run, its evaluation, and the results."""
