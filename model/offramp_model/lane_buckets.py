"""Which sizes of batch a device lane holds, and after which exits each moves its rows.

Both follow from what passes of the lane cost on the device at hand: it is opened once without any
moving, timed, and opened again with what pays by the cost rule. Knows nothing about requests.
"""

from collections.abc import Sequence
from dataclasses import replace

from offramp_kernels.contract import MAX_ROWS
from offramp_model.cost import StepTable, compactions
from offramp_model.device_lane import MAX_LENGTH, Bucket, DeviceLane
from offramp_model.encoder import PackedEncoder
from offramp_model.full_pass import layer_timer
from offramp_model.policies import ExitPolicy

SMALLEST = 128  # tokens of the smallest bucket; below it a layer costs as much
SHORTEST = 3  # tokens of a text, specials included: as many rows as a bucket can need
TIMING_S = 2.0
LAUNCH_S, COPY_BYTES_PER_S = 5e-6, 2e12
"""Price of moving rows, until it is measured on the device at hand: two launches, one copy."""


def open_lane(
    stack: PackedEncoder,
    policy: ExitPolicy,
    *,
    max_tokens: int,
    max_rows: int,
    survival: Sequence[float],
) -> tuple[DeviceLane, StepTable]:
    """A lane for batches of up to `max_tokens`, and seconds of one of its layers by live tokens.

    Args:
        stack: the encoder, on its device and in the dtype that is to run.
        policy: the exit rule.
        max_tokens, max_rows: of the largest batch.
        survival: share of the rows that goes on after each exit, as `compactions` takes it.

    Raises:
        ValueError: see `DeviceLane`.
    """
    still = buckets(max_tokens, max_rows, min(stack.config.max_length, MAX_LENGTH))
    lane = DeviceLane(stack, stack.activation, policy, still)
    largest = still[-1]
    most = min(max_tokens, largest.rows * largest.max_length)
    time_layer = layer_timer(
        lane, stack.num_layers, longest=largest.max_length, most_rows=largest.rows
    )
    table = StepTable.measured(time_layer, most_tokens=most, budget_s=TIMING_S)
    moving = [
        replace(one, compact_after=_moved_after(stack, table, one, survival)) for one in still
    ]
    if moving != still:
        lane = DeviceLane(stack, stack.activation, policy, moving)
    return lane, table


def buckets(max_tokens: int, max_rows: int, max_length: int) -> list[Bucket]:
    """Sizes that double up to the largest batch, which is one of them."""
    sizes, size = [], SMALLEST
    while size < max_tokens:
        sizes.append(size)
        size *= 2
    rows = min(max_rows, MAX_ROWS)
    return [
        Bucket(tokens, min(rows, max(1, tokens // SHORTEST)), max_length)
        for tokens in (*sizes, max_tokens)
    ]


def moving_price(stack: PackedEncoder) -> dict[str, float]:
    """What `compactions` takes as the price of moving rows of this encoder."""
    size = stack.embeddings.words.dtype.itemsize
    per_token = 2 * stack.config.hidden_size * size / COPY_BYTES_PER_S
    return {"launch_seconds": LAUNCH_S, "seconds_per_token": per_token}


def _moved_after(
    stack: PackedEncoder, table: StepTable, bucket: Bucket, survival: Sequence[float]
) -> frozenset[int]:
    exits = stack.config.exit_layers
    return compactions(table, bucket.tokens, exits, survival, **moving_price(stack))
