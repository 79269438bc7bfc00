"""The embedded server: the REST routes of OpenVINO Model Server on openvino-genai, one worker process for each model.

docs/openvino-server.md tells how to start it by hand. Of engine_plugin it imports only what tests/test_layers.py
lists in `SHARED`. Its processes and their modules:

The server process (`python -m openvino_server serve`), which never imports OpenVINO:
    __main__, serving       start, settings, and the end when stdin ends
    app, requests           routes, access, JSON in and out
    chat_api, vectors_api, images_api, audio_api, control_api     the handlers of the routes
    stream, sinks           answers on their way from a worker to a client
    config, registry, model config.json, the models that are served, one model's life
    link, unpacking, watch  one worker process: frames, calls, its end, its health

A worker (`python -m openvino_server.worker`), one for each model:
    worker, frames          the two pipes to the server process
    pipelines               one module for each kind of model, on openvino-genai
    calls, dialect, tagged  tool calls and reasoning in the text of an answer

The grammar check (`python -m openvino_server.grammar_check`), spawned by a worker:
    grammar_check           compiles a grammar before the worker's pipeline does

Both sides use `chat` (messages and tools) and `errors`.
"""
