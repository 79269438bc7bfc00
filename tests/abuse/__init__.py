"""Nonsense and malice: whatever comes in, by whichever door, is answered or refused as it should be.

What has a right answer is tested beside the code; here only what must hold for every input. The examples are the same
in every run. `ABUSE=5000` runs so many random examples in each test instead, for changes to a parser.
"""
