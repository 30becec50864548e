"""The commands: `launch/*.py` in a checkout and `megavit COMMAND` of an installed package call `main` here."""
