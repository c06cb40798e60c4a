"""``python3 -m nbdbackupd`` is ``nbdbackupctl``."""

import sys

from nbdbackupd.app.ctl import main

if __name__ == "__main__":
    sys.exit(main())
