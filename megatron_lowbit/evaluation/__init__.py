"""Evaluation: what is measured against native communication, the resumable loop, the report."""
