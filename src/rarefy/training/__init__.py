"""The loop: data order, twins in turn, evaluation, checkpoints, log."""
