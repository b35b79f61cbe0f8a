"""What idle OpenMP threads should do: one training step and one full-depth batch, timed.

libgomp reads its settings when torch is loaded, so run it once for each, quiet and beside a busy
process:

    python model/bench/bench_idle_threads.py CHECKPOINT
    OMP_WAIT_POLICY=PASSIVE python model/bench/bench_idle_threads.py CHECKPOINT
    GOMP_SPINCOUNT=10000 python model/bench/bench_idle_threads.py CHECKPOINT
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import AutoModel

from offramp_model import Encoding, load_checkpoint
from offramp_model.recorded import record_exits


def median_ms(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def main() -> None:
    torch.set_num_threads(2)
    directory = sys.argv[1]
    stack = load_checkpoint(directory).stack()
    encodings = [Encoding([5 + n % 20] * (6 + n % 14), [0] * (6 + n % 14)) for n in range(32)]
    model = AutoModel.from_pretrained(directory).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(1000, 20000, (32, 13))

    def step() -> None:
        model(input_ids=ids).last_hidden_state.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    print(f"training step {median_ms(step, 16):.0f} ms")
    print(f"batch of 32 {median_ms(lambda: record_exits(stack, encodings), 30):.0f} ms")


if __name__ == "__main__":
    main()
