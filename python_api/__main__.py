"""`python -m effk` prints what was found on this machine."""

import json

from . import status

print(json.dumps(status(), indent=2, default=str))
