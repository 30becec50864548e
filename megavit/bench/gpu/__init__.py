"""The first hour on a GPU, in stages; `megavit/bench/README.md` says what each of them answers."""
