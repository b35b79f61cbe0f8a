"""mosec (HTTP in Rust, workers in Python, dynamic batches) around the classifier."""

import sys
from typing import Any

from classifier import Answer, make_classifier, options
from mosec import Server, Worker


class Classify(Worker):
    """One process: `{"text": …}` of each request in the batch → its answer."""

    def __init__(self) -> None:
        super().__init__()
        self._classify = make_classifier(options())
        self._classify(["warm", "up"])

    def forward(self, data: Any) -> Any:
        if isinstance(data, dict):  # mosec gives no list where a batch is one
            return self._classify([data["text"]])[0]
        answers: list[Answer] = self._classify([one["text"] for one in data])
        return answers


if __name__ == "__main__":
    given = options()
    # mosec reads the command line for itself, in this process.
    sys.argv += ["--address", "127.0.0.1", "--port", str(given.listen), "--log-level", "warning"]
    sys.argv += ["--timeout", "60000"]
    server = Server()
    server.append_worker(
        Classify,
        num=given.workers,
        max_batch_size=given.rows,
        max_wait_time=max(1, round(given.delay_ms)),  # 0 would be its default, 10 ms
    )
    server.run()
