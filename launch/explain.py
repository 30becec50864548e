"""Say why a model decides so: `python launch/explain.py FOLDER photo.jpg --methods located`; see --help."""

import sys

from megavit.launch.explain import main

if __name__ == "__main__":
    sys.exit(main())
