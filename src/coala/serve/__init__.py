"""A run as a server that speaks the OpenAI protocol: many requests at once through one model, guided by its head.

    schemas    what requests may hold and what replies look like
    worker     the one thread that owns the model; work in, news out; how much may wait
    answers    a request's replies, from the worker's news to text, tokens and facts
    protocol   how they are worded: one JSON object, or a stream of events
    pieces     tokens to the pieces of text they add
    scoring    the head's scores of given replies, whole and after every token
    memory     what is no longer used goes back to the machine
    gate       what every request passes: sizes, times, keys, headers, counts
    metrics    counts and times in Prometheus's text format
    observing  what is counted
    contract   the OpenAPI document, and what is said of a body that does not fit it
    app        the addresses
    listening  sockets, patience with slow clients, an orderly end

Knows nothing of how heads are fitted or tokens chosen. Needs the extra `serve`.
"""

from coala.serve.limits import Limits

__all__ = ["Limits"]
