"""Triton Inference Server, run by PyTriton, around the classifier."""

import logging
import os
import sysconfig
from typing import Any

import numpy as np
from classifier import make_classifier, options
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


def make_infer(given: Any) -> Any:
    """What one instance of the model calls with a batch."""
    classify = make_classifier(given)
    classify(["warm", "up"])

    @batch
    def infer(text: np.ndarray) -> dict[str, np.ndarray]:
        answers = classify([one.decode() for one in text[:, 0]])
        return {
            "label": np.array([[one["label"].encode()] for one in answers], dtype=object),
            "score": np.array([[one["score"]] for one in answers], dtype=np.float32),
        }

    return infer


def main() -> None:
    given = options()
    logging.basicConfig(level=logging.WARNING)
    # Triton's Python stub takes the system's libpython, and the interpreter's own library with it:
    # both must be of one version.
    libraries = [str(sysconfig.get_config_var("LIBDIR")), os.environ.get("LD_LIBRARY_PATH", "")]
    os.environ["LD_LIBRARY_PATH"] = ":".join(filter(None, libraries))
    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=given.listen,
        allow_grpc=False,
        allow_metrics=False,
        log_verbose=0,
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="classifier",
            infer_func=[make_infer(given) for _ in range(given.workers)],
            inputs=[Tensor(name="text", dtype=bytes, shape=(1,))],
            outputs=[
                Tensor(name="label", dtype=bytes, shape=(1,)),
                Tensor(name="score", dtype=np.float32, shape=(1,)),
            ],
            config=ModelConfig(
                max_batch_size=given.rows,
                batcher=DynamicBatcher(max_queue_delay_microseconds=round(given.delay_ms * 1000)),
            ),
        )
        triton.serve()


if __name__ == "__main__":
    main()
