"""The lane over the real kernels, in Triton's interpreter: run by test_device_lane.py."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from loading import load
from offramp_model.policies import make_policy
from offramp_model.rows import Encoding

cases: Any = load("tests/unit/model/lane_cases.py")
laws: Any = load("tests/unit/model/test_laws.py")


def main() -> None:
    torch.set_num_threads(1)
    stack = cases.make_stack()
    generator = torch.Generator().manual_seed(0)
    lengths = [7, 1, 3, 12, 2]
    encodings = [
        Encoding(torch.randint(1, 49, (length,), generator=generator).tolist(), [0] * length)
        for length in lengths
    ]
    for number, name in enumerate(("entropy", "vote", "gate", "patience")):
        compact = frozenset((1, 2)) if number % 2 == 0 else frozenset((2,))
        lane = cases.make_lane(stack, name, compact, "triton", ((32, 8),))
        asked = laws.random_settings(len(encodings), make_policy(name), 3, seed=number)
        found = cases.of_lane(lane, encodings, asked)
        cases.assert_same(found, cases.of_loop(stack, name, encodings, asked), 1e-4)
    sys.stdout.write("the lane and the loop agree\n")


if __name__ == "__main__":
    main()
