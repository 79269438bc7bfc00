"""The soak: the hosted plugin under load and mishaps for minutes, and what it has lost on the way.

    python -m tests.soak --engine llamacpp --minutes 3 --streams 200 --seed 1        (make soak)

A host launches the real plugin, whose llama.cpp is `tests.fake_engine`. `load` calls it from all sides and leaves at
every moment; `mishaps` kills, freezes, unloads and stops engines meanwhile. Before and after, at rest and with its
engine stopped, the plugin is looked at from outside (`rig`) and inside (`watched_plugin`), and `figures` compares.

`--engine openvino` soaks the default plugin with its real server and tiny models. `--engine ollama` soaks two plugins
side by side, one with an Ollama of its own and one with somebody else's, which `tests.ollama.contract` is both times;
`--engine openai` one with somebody else's server that speaks OpenAI's REST (`openai_server`). These end by the plugin
being killed again and again under load, and at last by the death of its host: nothing of it may be left, nothing may
go on at a server of somebody else, and that server must live.
"""
