"""A run as a server that speaks the OpenAI protocol: many requests at once through one model, guided by its head.

    schemas         what requests may hold
    shapes          what answers look like
    bodies          from bytes to a request, bounded; what is wrong with one, in plain words
    work            what is handed to a thread, and the news of it
    reading         the one thread that turns texts into tokens, a piece of each request in turn
    prompts         prompts to tokens, each once and none that is too long in full
    worker          the one thread that owns the model; work in, news out; how much may wait
    answers         a request's replies, from the worker's news to text, tokens and facts
    protocol        how they are worded: one JSON object, or a stream of events
    detokenize      tokens to the pieces of text they add
    spelling        the bytes that tokens stand for
    scoring         the head's scores of given replies, whole and after every token
    memory          what is no longer used goes back to the machine
    gate            what every request passes: sizes, times, keys, headers, counts
    server_metrics  what is counted and timed, for Prometheus
    contract        the OpenAPI document
    app             the addresses

Knows nothing of how heads are fitted or tokens chosen. Needs the extra `serve`.
"""

from coala.serve.limits import Limits

__all__ = ["Limits"]
