"""Front processes (`--http-workers`): several that speak HTTP before one that owns the engine.

Speaking HTTP, reading JSON and tokenising cost more processor time a text than a GPU does, and
Python does them on one core a process. So each front takes connections from the same socket, does
all that a door does, and hands tokens over a socket of its own to the process with the engine,
which knows nobody's JSON.

    link        messages between the two, and how they cross
    front       the process that speaks HTTP
    remote      what a front's pipelines ask instead of a queue and metrics of their own
    counterpart in the process with the engine: answers what one front asks
    keeper      there as well: starts fronts, tells them how things stand, replaces who dies
    process     the life of that process, from listening to the last goodbye
"""
