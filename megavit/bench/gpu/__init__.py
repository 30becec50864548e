"""The first hour on a GPU, in stages; `megavit/bench/README.md` says how to run them and what each answers."""
