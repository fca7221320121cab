"""A child of `engines.child.ChildServer` that says what its options ask for, and then is gone or stays."""

import json
import sys

options = {"says": "READY", "stays": False} | json.loads(sys.argv[1])
if options["says"]:
    print(options["says"], flush=True)
if options["stays"]:
    sys.stdin.read()
