"""What train.py needs beside its loop: configuration, workers, passes, logs and tables."""
