"""A lighthouse until it is killed, `lighthouse.py LEAST PORT`: see tests/support/fleet.py."""

import sys
import threading

from fleet import lighthouse

if __name__ == "__main__":
    with lighthouse(*map(int, sys.argv[1:])):
        threading.Event().wait()
