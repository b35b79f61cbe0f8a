"""KServe's own client against `offramp-serve`: V1 and V2, JSON and binary tensors.

Run with `--client`, it starts a server and runs itself again with the interpreter that has the
`kserve` package, which cannot share an environment with this project's tools.
"""

import argparse
import asyncio
import re
import subprocess
import sys
from pathlib import Path

TEXTS = ["play some jazz", "will it rain in Oslo tomorrow"]


def serve_and_ask(checkpoint: str, client: str) -> int:
    """Start a server, ask it with the other interpreter, end it."""
    command = [sys.executable, "-m", "offramp_service", "--model-id", checkpoint, "--port", "0"]
    with subprocess.Popen(
        [*command, "--served-model-name", "clf", "--drain-seconds", "0"],
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        found = re.search(r"http://[\d.:]+", server.stdout.readline())
        if found is None:
            return 1
        try:
            return subprocess.run([client, __file__, "--ask", found[0]], check=False).returncode
        finally:
            server.terminate()


async def ask(address: str) -> None:
    """Everything that KServe's client can ask of a classifier."""
    import numpy as np
    from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    assert await client.is_server_live(address)
    assert await client.is_server_ready(address)
    assert await client.is_model_ready(address, "clf")
    labels = []
    for binary in (False, True):
        tensor = InferInput("text", [len(TEXTS)], "BYTES")
        tensor.set_data_from_numpy(
            np.array([text.encode() for text in TEXTS], dtype=object), binary_data=binary
        )
        request = InferRequest("clf", [tensor], parameters={"speedup": 1.0})
        response = await client.infer(address, request, model_name="clf")
        found = {one.name: one.as_numpy() for one in response.outputs}
        assert found.keys() == {"logits", "probabilities", "label", "exit_layer"}
        assert np.allclose(found["probabilities"].sum(axis=1), 1.0, atol=1e-5)
        labels.append([str(one) for one in found["label"]])
    first = InferenceRESTClient(RESTConfig(protocol="v1"))
    assert await first.is_server_live(address)
    assert await first.is_model_ready(address, "clf")
    answered = await first.infer(address, {"instances": TEXTS}, model_name="clf")
    labels.append([one["label"] for one in answered["predictions"]])
    assert labels[0] == labels[1] == labels[2], labels
    sys.stdout.write(f"V1, V2 as JSON and V2 as bytes agree: {labels[0]}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", help="checkpoint to serve")
    parser.add_argument("--client", help="interpreter with the kserve package")
    parser.add_argument("--ask", help="address of a running server")
    arguments = parser.parse_args()
    if arguments.ask is None:
        # Not resolved: the link is what makes it the environment's interpreter.
        return serve_and_ask(arguments.server, str(Path(arguments.client).absolute()))
    asyncio.run(ask(arguments.ask))
    return 0


if __name__ == "__main__":
    sys.exit(main())
