"""Measurements behind `launch/bench.py`: each compares ways of doing the same work, side by side in one
process. README.md says what each answers, and holds the figures."""
