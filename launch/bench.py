"""Measure, each against other ways of doing the same work; see --help."""

import sys

from megavit.launch.bench import main

if __name__ == "__main__":
    sys.exit(main())
