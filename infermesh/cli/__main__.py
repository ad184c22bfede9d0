"""`python -P -m infermesh.cli VERB …`: how `up` starts its children."""

import sys

from infermesh.cli import main

if __name__ == "__main__":
    sys.exit(main())
