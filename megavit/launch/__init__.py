"""The commands: `launch/*.py` in a checkout, `megavit COMMAND` of an installed package, call `main` here."""
