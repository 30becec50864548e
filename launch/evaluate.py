"""Say how good a model is: `python launch/evaluate.py FOLDER --tasks knn,linear --data DIR`; see --help."""

import sys

from megavit.launch.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
