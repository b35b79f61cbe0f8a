"""One text through the whole service, from admission to answer, without a client and without HTTP.

For image builds and init containers, which want to know that a checkpoint loads, warms up and
answers on this machine, and want nobody to listen meanwhile. It knows nothing about processes.
"""

import asyncio

from offramp_service.jobs import Job, TimedAnswer
from offramp_service.pipeline import Cut, Place, RoomPipeline
from offramp_service.schemas.shared import Asked

TEXT = "What will the weather be like tomorrow?"


async def rehearse(pipeline: RoomPipeline) -> TimedAnswer:
    """The answer to a text that asks for nothing special; the application must be warm.

    Raises:
        ServiceError: there is none.
        TimeoutError: there is none in the time that a request has.
    """
    controls = pipeline.controls.resolve(Asked(), {})
    async with asyncio.timeout(pipeline.settings.request_timeout_ms / 1000):
        with pipeline.batcher.admit(1, "rehearsal") as batch:
            (encoding,) = await pipeline.encode([TEXT], Place("text", is_list=False), cut=Cut())
            job = Job(encoding.ids, encoding.type_ids, controls)
            (answer,) = await pipeline.batcher.submit(batch, [job])
    return answer
