"""OpenAI-compatible chat servers and what asking them costs: one client, for judges and for synthesis.

A server is not trusted: its answers are bounded in bytes and time, and keys are struck out of them.
"""

from coala.endpoint.budget import Ledger, OutOfBudget, Usage
from coala.endpoint.client import Client, Failed, RetryPolicy, Stopped
from coala.endpoint.completion import Completion, read_completion
from coala.endpoint.secrets import strike
from coala.endpoint.token_limit import Change, change_for
from coala.endpoint.transport import Answer, Connections, Post, Server, Unanswered, bare, is_loopback

__all__ = [
    "Answer",
    "Change",
    "Client",
    "Completion",
    "Connections",
    "Failed",
    "Ledger",
    "OutOfBudget",
    "Post",
    "RetryPolicy",
    "Server",
    "Stopped",
    "Unanswered",
    "Usage",
    "bare",
    "change_for",
    "is_loopback",
    "read_completion",
    "strike",
]
