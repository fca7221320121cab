"""Pronghorn: a self-hosted batch inference server behind OpenAI's Files and Batch API."""

__version__ = "0.1.0"
