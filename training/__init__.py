"""What train.py needs around the loop: configuration, workers, logs and tables."""
