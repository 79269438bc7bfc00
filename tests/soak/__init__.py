"""The soak: the hosted plugin under load and faults for minutes, and what it leaks.

    python -m tests.soak --engine llamacpp --minutes 3 --streams 200 --seed 1        (make soak)

A host launches the real plugin, whose llama.cpp is `tests.fake_engine`. `load` calls it concurrently and abandons
calls at any moment; `mishaps` kills, suspends, unloads and stops engines meanwhile. Before and after, at rest with
its engine stopped, the plugin is observed from outside (`rig`) and inside (`watched_plugin`), and `figures` compares.

`--engine openvino` soaks the default plugin with its real server and tiny models. `--engine ollama` soaks two plugins
side by side, one with a managed Ollama and one with an attached one, both of which are
`tests.engines.ollama.contract`; `--engine openai` one with an attached server with OpenAI's REST API
(`openai_server`). These end with kills of the plugin under load, and with a kill of its host: no process of it may be
left, no request may continue at an attached server, and that server must still run.
"""
