"""The training run: build, step, loop, signals, anomalies."""
