"""Evaluation: held-out loss, latency, sweeps over the dials, generation and the report."""
