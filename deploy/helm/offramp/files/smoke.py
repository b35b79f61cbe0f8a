"""Is a release fit to serve? Asks /readyz, then has each model classify one text.

    smoke.py URL TEXT MODEL...

API_KEY in the environment is shown as a client would. The pod of `helm test` runs it with the
standard library alone.
"""

import json
import os
import sys
import urllib.error
import urllib.request

SECONDS = 30


def ask(url: str, body: object = None) -> str:
    """The answer's text, or an end with the reason."""
    headers = {"content-type": "application/json"}
    if key := os.environ.get("API_KEY", "").strip():
        headers["authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, headers)
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        sys.exit(f"{url}: {error.code} {error.read().decode(errors='replace')[:500]}")
    except OSError as error:
        sys.exit(f"{url}: {error}")


def main(url: str, text: str, *models: str) -> None:
    print(f"{url}/readyz:", ask(f"{url}/readyz"))
    for model in models:
        body = {"model": model, "input": text, "return_details": True}
        (item,) = json.loads(ask(f"{url}/classify", body))["data"]
        layer = item["details"]["exit_layer"]
        print(f"{model}: {item['label']} with {max(item['probs']):.3f}, after layer {layer}")


if __name__ == "__main__":
    main(*sys.argv[1:])
