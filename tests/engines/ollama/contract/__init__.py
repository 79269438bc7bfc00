"""The contract server: implements Ollama's API on the wire: paths, status codes, headers, streams and errors.

    python -m tests.engines.ollama.contract serve            as `ollama serve`: reads OLLAMA_HOST, OLLAMA_MODELS, …
    python -m tests.engines.ollama.contract --version        as `ollama --version`

Its answers are derived from the requests (see `words`), so that tests can compare them. A model's name
(`fault-no-done:latest`) or a rule (`POST /contract/rules`) causes a fault; `faults` lists them.
`handle.ContractServer` runs the server as a process; the fixture `contract_server` provides one.

Without a folder of models it starts with `library.MODELS`; with `--bare` without models, like a new Ollama.
"""
