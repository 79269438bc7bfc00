"""The soak: the hosted plugin under load and mishaps for minutes, and what it has lost on the way.

    python -m tests.soak --minutes 3 --streams 200 --seed 1        (make soak)

A host launches the real plugin, whose llama.cpp is `tests.fake_engine`. `load` calls it from all sides and leaves at
every moment; `mishaps` kills, freezes, unloads and stops engines meanwhile. Before and after, at rest and with its
engine stopped, the plugin is looked at from outside (`rig`) and inside (`watched_plugin`), and `report` compares.
"""
