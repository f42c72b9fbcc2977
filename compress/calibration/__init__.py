"""Calibration: the sequential driver, statistics of layer inputs, stored progress, records and coverage."""
