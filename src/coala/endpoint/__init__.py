"""OpenAI-compatible chat servers and what asking them costs: one client, for judges and for synthesis.

A server is not trusted: its answers are bounded in bytes and time, and keys are struck out of them.
"""

from coala.endpoint.budget import Ledger, OutOfBudget, Usage
from coala.endpoint.client import Client, RequestFailed, RetryPolicy, Stopped
from coala.endpoint.completion import Completion
from coala.endpoint.token_limit import Change, change_for
from coala.endpoint.transport import Post, Server, bare, is_loopback

__all__ = [
    "Change",
    "Client",
    "Completion",
    "Ledger",
    "OutOfBudget",
    "Post",
    "RequestFailed",
    "RetryPolicy",
    "Server",
    "Stopped",
    "Usage",
    "bare",
    "change_for",
    "is_loopback",
]
