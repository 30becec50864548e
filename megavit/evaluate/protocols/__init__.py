"""Protocols: one file each, functions of features that yield measurements."""
