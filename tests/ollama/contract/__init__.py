"""A server of the tests' own that keeps Ollama's contract on the wire: paths, status codes, headers, streams, errors.

    python -m tests.ollama.contract serve            as `ollama serve`: reads OLLAMA_HOST, OLLAMA_MODELS, …
    python -m tests.ollama.contract --version        as `ollama --version`

What it answers is made of what it was asked (see `words`), so that a test can tell. Faults come by a model's name
(`fault-no-done:latest`) or by a rule (`POST /contract/rules`); see `faults` for all of them. `handle.ContractServer`
runs it as a process; the fixture `contract_server` hands out one of these.

Without a folder of models it begins with `library.MODELS`; with `--bare` it begins with none, as a new Ollama does.
"""
