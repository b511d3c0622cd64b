"""The CPU engine: plain loops over NumPy arrays, compiled by Numba. Knows neither torch nor masks.

Lists of keys are int32 (B, h, Q, K) with counts int32 (B, h, Q): the first `count` entries are keys, the rest is -1. h is 1,
the number of kv heads, or H; head i of n reads row i * h // n of a list. Import these modules where they are used: Numba takes
half a second to load.
"""
