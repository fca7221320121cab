"""A child process that runs llama.cpp's own HTTP server: `python -m pronghorn.engines.llamacpp_child OPTIONS`.

What it says to its parent is in `child.py`; llama.cpp's log goes to stderr.
"""

from __future__ import annotations

import signal
import sys

import msgspec

from pronghorn.engines.child import end_failed, end_with_parent, take_stdout


class ChildOptions(msgspec.Struct, frozen=True):
    """What one llama.cpp server runs."""

    model: str
    name: str
    port: int
    slots: int
    threads: int
    context_tokens: int
    answer_tokens: int
    embeddings: bool


def main() -> None:
    """Serve until told to stop."""
    options = msgspec.json.decode(sys.argv[1], type=ChildOptions)
    status = take_stdout()
    try:
        server = _serve(options)
    except Exception as error:
        end_failed(status, error)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group, they are the server's, which ends us
    end_with_parent()
    status.write("READY\n")
    while server is not None:
        signal.pause()


def _serve(options: ChildOptions) -> object:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.model_alias = {options.name}
    params.hostnames = ["127.0.0.1"]
    params.port = options.port
    params.n_parallel = options.slots
    params.n_ctx = options.slots * options.context_tokens
    params.n_predict = options.answer_tokens
    params.cpuparams.n_threads = options.threads
    params.cpuparams_batch.n_threads = options.threads
    params.cache_ram_mib = 0  # the slots' own caches suffice; copying prompts to host memory costs throughput
    params.n_ctx_checkpoints = 0
    params.fit_params = False
    params.ui = False
    params.endpoint_metrics = True
    params.verbosity = 1
    params.n_threads_http = 2 * options.slots + 8  # a request holds a thread for as long as it is answered
    if options.embeddings:
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
        # An embedding's prompt has to fit one physical batch.
        params.n_batch = params.n_ubatch = options.context_tokens
    return xllamacpp.Server(params)


if __name__ == "__main__":
    main()
