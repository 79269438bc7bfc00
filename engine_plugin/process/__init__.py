"""One subprocess and all that it spawns: started, watched, restarted, and ended whatever happens.

Kept empty, since engine processes of ours import the guard from here.
"""
