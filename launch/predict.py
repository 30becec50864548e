"""Say what photos show: `python launch/predict.py FOLDER photos/*.jpg`; see --help."""

import sys

from megavit.launch.predict import main

if __name__ == "__main__":
    sys.exit(main())
