"""The images' HEALTHCHECK: exit 0 while `/readyz` says 200, else 1 with the reason.

Standard library only, so that a check takes a few hundredths of a second. It finds the server as
the server finds itself: by PORT. A port given as a flag or in a configuration file it cannot know.
"""

import http.client
import os
import sys

port = int(os.environ.get("PORT") or 3000)
connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
try:
    connection.request("GET", "/readyz")
    response = connection.getresponse()
    sys.stdout.write(f"{response.status} {response.read().decode(errors='replace')}")
    code = 0 if response.status == 200 else 1
except OSError as error:
    sys.stdout.write(f"port {port}: {error}")
    code = 1
sys.exit(code)
