"""The first hour on a GPU, in stages: what each answers, and how to run it, is in `megavit/bench/README.md`."""
