"""Measurements behind `launch/bench.py`: each compares ways of doing the same work, side by side in one
process."""
