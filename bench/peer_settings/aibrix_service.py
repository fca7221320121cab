"""AIBrix's metadata service as `--dry-run` wires it, but with an engine at the URL that is the first argument.

Runs in AIBrix's own environment, not in ours.
"""

import sys

from aibrix.batch.client.sources.static import GatewayEndpointSource
from aibrix.metadata import app

engine = sys.argv.pop(1)
app.NoopEndpointSource = lambda: GatewayEndpointSource(engine)
sys.argv.append("--dry-run")
app.main()
